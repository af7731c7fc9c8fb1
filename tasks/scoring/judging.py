"""Grade samples through the judge, one by one or as a batch job."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tasks.contract import StageFolder
from tasks.errors import ReplyInvalid
from tasks.manifests import Judgement, Sample, Side, SideScores
from tasks.scoring.config import ScoringConfig
from tasks.scoring.rubric import SampleJudgement
from tasks.services.llm.batch import ask_batch
from tasks.services.llm.client import Answer, LlmService
from tasks.services.llm.requests import RequestSpec

Answers = dict[str, Answer[SampleJudgement]]


def ask_judge(
    specs: dict[str, RequestSpec],
    config: ScoringConfig,
    *,
    llm: LlmService,
    folder: StageFolder,
    on_progress: Callable[[int, int], None],
) -> tuple[Answers, dict[str, str]]:
    """Return grades and failures by sample key.

    Raises:
        ReplyInvalid: more samples failed than `scoring.max_failed_share` allows.

    """
    on_progress(0, len(specs))
    if config.executor == "batch":
        answers, failures = ask_batch(
            llm,
            specs,
            role="judge",
            reply=SampleJudgement,
            state_prefix=f"{folder.prefix}/batches",
            poll_seconds=config.poll_seconds,
            max_wait_seconds=config.max_wait_seconds,
            on_progress=on_progress,
        )
    else:
        answers, failures = ask_each(specs, llm=llm, on_progress=on_progress)
    if len(failures) > config.max_failed_share * len(specs):
        example = next(iter(failures.values()))
        raise ReplyInvalid(f"{len(failures)} of {len(specs)} samples got no grade: {example}; run again to ask anew")
    return answers, failures


def ask_each(
    specs: dict[str, RequestSpec], *, llm: LlmService, on_progress: Callable[[int, int], None]
) -> tuple[Answers, dict[str, str]]:
    """Ask about every sample in turn, several at once."""
    answers: Answers = {}
    failures: dict[str, str] = {}

    def ask(name: str) -> Answer[SampleJudgement] | str:
        try:
            return llm.ask(specs[name], role="judge", reply=SampleJudgement)
        except ReplyInvalid as error:
            return str(error)

    with ThreadPoolExecutor(llm.profile("judge").concurrency) as pool:
        for name, outcome in zip(specs, pool.map(ask, specs), strict=True):
            if isinstance(outcome, str):
                failures[name] = outcome
            else:
                answers[name] = outcome
            on_progress(len(answers) + len(failures), len(specs))
    return answers, failures


def to_judgements(samples: list[Sample], answers: Answers) -> tuple[Judgement, ...]:
    """Join grades with their samples."""
    return tuple(
        Judgement(
            sample=sample.image,
            side=sample.side,
            prompt=sample.prompt,
            evidence=answers[sample.image.key].reply.evidence[:500],
            concept_preservation=answers[sample.image.key].reply.concept_preservation,
            prompt_following=answers[sample.image.key].reply.prompt_following,
        )
        for sample in samples
        if sample.image.key in answers
    )


def average(judgements: tuple[Judgement, ...]) -> dict[Side, SideScores]:
    """Return mean grades per side."""
    scores: dict[Side, SideScores] = {}
    sides: tuple[Side, ...] = ("base", "tuned")
    for side in sides:
        rows = [judgement for judgement in judgements if judgement.side == side]
        if rows:
            scores[side] = SideScores(
                concept_preservation=sum(row.concept_preservation for row in rows) / len(rows),
                prompt_following=sum(row.prompt_following for row in rows) / len(rows),
            )
    return scores
