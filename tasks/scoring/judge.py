"""The judge and the second judge, on every sample, and the tie-break where their grades differ."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from tasks.errors import ReplyInvalid
from tasks.scoring.config import ScoringConfig
from tasks.scoring.judge_requests import JudgeContext, JudgeRequest, list_judge_requests, list_second_judge_requests
from tasks.scoring.scores import Judged, collect_grades
from tasks.scoring.tie_break import break_ties, find_disputed, read_tie_breaks
from tasks.services.llm.batch.jobs import BatchOptions, ask_many
from tasks.services.llm.executor import Answers, AskOptions, Specs
from tasks.services.llm.service import LlmService
from tasks.stage.cache import StageFolder

Show = Callable[[str], Callable[[int, int], None]]


@dataclass
class JudgeRun:
    """Requests and answers, before any score is computed."""

    requests: list[JudgeRequest]
    answers: Answers
    failures: dict[str, str]
    second: Answers = field(default_factory=dict)
    second_grades: dict[str, dict[str, int]] = field(default_factory=dict)
    """By sample key and axis."""
    tie_breaks: Answers = field(default_factory=dict)
    tie_break_grades: dict[tuple[str, str], int] = field(default_factory=dict)
    """Grades of tie-break requests, by sample key and axis."""

    @property
    def judged(self) -> Judged:
        """The first judge's requests with their answers, before tie-breaks."""
        return Judged(self.requests, self.answers)

    @property
    def given(self) -> Answers:
        """All answers of the first judge, tie-breaks included."""
        return {**self.answers, **self.tie_breaks}

    def reasoning(self) -> dict[str, str]:
        """Return the judges' reasoning, by request."""
        second = {f"second judge/{name}": answer for name, answer in self.second.items()}
        return {name: answer.reasoning for name, answer in {**self.given, **second}.items()}


def grade(
    config: ScoringConfig, context: JudgeContext, *, llm: LlmService, folder: StageFolder, show: Show
) -> JudgeRun:
    """Send all requests to the judge, then to the second judge, then the tie-breaks.

    Raises:
        ReplyInvalid: more requests failed than `scoring.max_failed_fraction` allows.

    """

    def ask(requests: list[JudgeRequest], role: str) -> tuple[Answers, dict[str, str]]:
        specs = {request.name: request.spec for request in requests}
        options = AskOptions(role, on_progress=show(role.replace("_", " ")))
        return ask_judge(llm, specs, config, folder=folder, options=options)

    requests = list_judge_requests(config, context)
    grading = JudgeRun(requests, *ask(requests, "judge"))
    check_failures(config, grading.failures, num_requests=len(requests))
    if llm.config.fallback_chain("second_judge"):
        others = list_second_judge_requests(config, context)
        # A second judge only measures agreement, so its failures don't fail the samples.
        grading.second, _ = ask(others, "second_judge")
        grading.second_grades = collect_grades(Judged(others, grading.second))
    disputed = find_disputed(config, context.samples, grading.judged, second=grading.second_grades)
    grading.tie_breaks = break_ties(disputed, llm=llm, on_progress=show("disputed grades"))
    grading.tie_break_grades = read_tie_breaks(disputed, grading.tie_breaks)
    return grading


def batch_options(config: ScoringConfig, *, state_prefix: str) -> BatchOptions:
    """Return the options of a judge's batch job."""
    return BatchOptions(
        state_prefix=state_prefix,
        poll_seconds=config.poll_seconds,
        max_wait_seconds=config.max_wait_seconds,
        deadline_seconds=config.deadline_seconds,
        is_enabled=config.executor == "batch",
    )


def ask_judge(
    llm: LlmService, specs: Specs, config: ScoringConfig, *, folder: StageFolder, options: AskOptions
) -> tuple[Answers, dict[str, str]]:
    """Return answers and failure reasons by request name; stop early where more fail than allowed."""
    options.on_progress(0, len(specs))
    batch = batch_options(config, state_prefix=f"{folder.prefix}/batches/{options.role}")
    # Stops a failing run early, before it has paid for all requests.
    limited = replace(options, max_failures=math.floor(config.max_failed_fraction * len(specs)))
    return ask_many(llm, specs, limited, batch=batch)


def check_failures(config: ScoringConfig, failures: Mapping[str, str], *, num_requests: int) -> None:
    """Raise ReplyInvalid where more requests failed than `scoring.max_failed_fraction` allows."""
    if len(failures) > config.max_failed_fraction * num_requests:
        example = next(iter(failures.values()))
        failed = f"{len(failures)} of {num_requests} judge requests failed"
        raise ReplyInvalid(f"{failed}: {example}; run again to retry them")
