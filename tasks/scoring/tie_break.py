"""Tie-break: where grades of one sample disagree, the next profile decides, with reasoning."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tasks.manifests.evaluation import Sample
from tasks.scoring.config import ScoringConfig
from tasks.scoring.judge_requests import AXES, JudgeRequest
from tasks.scoring.scores import Judged
from tasks.services.llm.executor import Answers, AskOptions, ask_each
from tasks.services.llm.service import LlmService

TIE_BREAK_REPEAT = 1_000  # a repeat that no plain question has


def find_disputed(
    config: ScoringConfig, samples: Sequence[Sample], judged: Judged, *, second: Mapping[str, Mapping[str, int]]
) -> list[JudgeRequest]:
    """Return a question for every sample and axis on which repeats, or the second judge, differ much."""
    disputed = []
    for sample in samples if config.disagreement_threshold else ():
        for axis in AXES:
            grades = judged.grades_of(sample, axis)
            other = second.get(sample.image.key, {}).get(axis)
            if grades and other is not None:
                grades = [*grades, other]
            if len(grades) > 1 and max(grades) - min(grades) >= config.disagreement_threshold:
                first = next(
                    q for q in judged.requests if (q.kind, q.axis, q.key) == ("sample", axis, sample.image.key)
                )
                spec = replace(first.spec, is_reasoning=True, repeat=TIE_BREAK_REPEAT)
                disputed.append(replace(first, spec=spec, kind="settled", repeat=TIE_BREAK_REPEAT))
    return disputed


def break_ties(
    disputed: Sequence[JudgeRequest], *, llm: LlmService, on_progress: Callable[[int, int], None]
) -> Answers:
    """Return the deciding answers, by question; one that nobody gives leaves the median as it was."""
    if not disputed:
        return {}
    specs = {question.name: question.spec for question in disputed}
    return ask_each(llm, specs, AskOptions("judge", on_progress=on_progress, first_fallback=1))[0]


def read_settled(disputed: Sequence[JudgeRequest], answers: Answers) -> dict[tuple[str, str], int]:
    """Return the deciding grades by sample key and axis."""
    given = [question for question in disputed if question.name in answers]
    return {(q.key, q.axis): int(getattr(answers[q.name].reply, q.axis)) for q in given}
