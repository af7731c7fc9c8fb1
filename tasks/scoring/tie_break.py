"""Tie-break: where grades of a sample disagree, the next profile of the fallback chain decides, with reasoning."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tasks.manifests.evaluation import Sample
from tasks.scoring.config import ScoringConfig
from tasks.scoring.judge_requests import AXES, JudgeRequest
from tasks.scoring.scores import Judged
from tasks.services.llm.executor import Answers, AskOptions, ask_each
from tasks.services.llm.service import LlmService

TIE_BREAK_REPEAT = 1_000  # beyond any ordinary repeat: the request must not hit its cached reply


def find_disputed(
    config: ScoringConfig, samples: Sequence[Sample], judged: Judged, *, second: Mapping[str, Mapping[str, int]]
) -> list[JudgeRequest]:
    """Return a tie-break request per sample and axis whose grades differ by `disagreement_threshold` or more.

    `second` are the second judge's grades by sample key and axis.
    """
    disputed = []
    for sample in samples if config.disagreement_threshold else ():
        for axis in AXES:
            grades = judged.grades_of(sample, axis)
            other = second.get(sample.image.key, {}).get(axis)
            if grades and other is not None:
                grades = [*grades, other]
            if len(grades) > 1 and max(grades) - min(grades) >= config.disagreement_threshold:
                first = next(
                    request
                    for request in judged.requests
                    if (request.kind, request.axis, request.key) == ("sample", axis, sample.image.key)
                )
                spec = replace(first.spec, is_reasoning=True, repeat=TIE_BREAK_REPEAT)
                disputed.append(replace(first, spec=spec, kind="tie_break", repeat=TIE_BREAK_REPEAT))
    return disputed


def break_ties(
    disputed: Sequence[JudgeRequest], *, llm: LlmService, on_progress: Callable[[int, int], None]
) -> Answers:
    """Return the tie-break answers by request name; where one fails, the median stands."""
    if not disputed:
        return {}
    specs = {request.name: request.spec for request in disputed}
    # `first_fallback` is clamped: in a chain of one, the same model decides again, with reasoning.
    return ask_each(llm, specs, AskOptions("judge", on_progress=on_progress, first_fallback=1))[0]


def read_tie_breaks(disputed: Sequence[JudgeRequest], answers: Answers) -> dict[tuple[str, str], int]:
    """Return the tie-break grades by (sample key, axis)."""
    given = [request for request in disputed if request.name in answers]
    return {(request.key, request.axis): int(getattr(answers[request.name].reply, request.axis)) for request in given}
