"""Grades of one sample that differ much: one more look decides, by the next profile and with reasoning."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from tasks.manifests.evaluation import Sample
from tasks.scoring.config import ScoringConfig
from tasks.scoring.judge_requests import AXES, JudgeRequest
from tasks.scoring.scores import grades_of
from tasks.services.llm.executor import Answers, ask_each
from tasks.services.llm.service import LlmService

SETTLING = 1_000  # a repeat that no plain question has


def find_disputed(
    config: ScoringConfig,
    samples: Sequence[Sample],
    questions: Sequence[JudgeRequest],
    answers: Answers,
    second: dict[str, dict[str, int]],
) -> list[JudgeRequest]:
    """Return a question for every sample and axis on which repeats, or the second judge, differ much."""
    disputed = []
    for sample in samples if config.disagreement_threshold else ():
        for axis in AXES:
            grades = grades_of(sample, axis, questions, answers)
            other = second.get(sample.image.key, {}).get(axis)
            if grades and other is not None:
                grades = [*grades, other]
            if len(grades) > 1 and max(grades) - min(grades) >= config.disagreement_threshold:
                first = next(q for q in questions if (q.kind, q.axis, q.key) == ("sample", axis, sample.image.key))
                spec = replace(first.spec, is_reasoning=True, repeat=SETTLING)
                disputed.append(replace(first, spec=spec, kind="settled", repeat=SETTLING))
    return disputed


def settle(disputed: Sequence[JudgeRequest], *, llm: LlmService, on_progress: Callable[[int, int], None]) -> Answers:
    """Return the deciding answers, by question; one that nobody gives leaves the median as it was."""
    if not disputed:
        return {}
    specs = {question.name: question.spec for question in disputed}
    return ask_each(specs, llm=llm, role="judge", on_progress=on_progress, first_fallback=1)[0]


def read_settled(disputed: Sequence[JudgeRequest], answers: Answers) -> dict[tuple[str, str], int]:
    """Return the deciding grades by sample key and axis."""
    given = [question for question in disputed if question.name in answers]
    return {(q.key, q.axis): int(getattr(answers[q.name].reply, q.axis)) for q in given}
