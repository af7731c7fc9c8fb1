"""The judge's choice between the samples of two runs, as the configured judge of the first run makes it."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows.cli.console import show_usd
from flows.cli.results.comparison.side_by_side import Compared, Row
from flows.cli.results.images.generate import show_progress
from flows.runs.context import open_budget
from tasks.errors import ConfigError, StillPending
from tasks.manifests.evaluation import Sample
from tasks.manifests.subject import SubjectSet

if TYPE_CHECKING:
    from tasks.scoring.judge_requests import JudgeContext
    from tasks.scoring.pairwise.models import PairwiseWins, PlannedPairs


@dataclass(frozen=True)
class Judged:
    """What the judge chose between the first run and another."""

    name: str
    reference: str
    wins: "PairwiseWins"

    def conclude(self) -> str:
        """Return one sentence with the win rate, its interval, and what it decides."""
        wins = self.wins
        counts = (
            f"the judge prefers {self.name} in {wins.second_wins} and {self.reference} in {wins.first_wins} of "
            f"{wins.num_pairs} pairs in subject fidelity (ties {wins.ties}, inconsistent {wins.inconsistent}"
            f"{f', failed {wins.failed}' if wins.failed else ''})"
        )
        rate = wins.win_rate
        if rate is None or rate.low is None or rate.high is None:
            return f"{counts}; no prompt is decided."
        interval = f"{rate.mean:.0%} [{rate.low:.0%}, {rate.high:.0%}]"
        text = f"{counts}; {self.name} wins {interval} of {rate.num} decided prompts"
        if not wins.is_decided:
            return f"{text}, inconclusive."
        return f"{text}, so {self.name if rate.mean > 0.5 else self.reference} is preferred."

    def outcome(self, row: Row, number: int) -> str:
        """Return the outcome of one pair by the names of the runs; empty where there is none."""
        from tasks.scoring.pairwise.models import FIRST, SECOND

        found = self.wins.outcomes.get(f"{row.samples[0].image.key}+{row.samples[number].image.key}", "")
        return {FIRST: self.reference, SECOND: self.name}.get(found, found)


def judge_runs(compared: Sequence[Compared], rows: Sequence[Row]) -> list[Judged]:
    """Ask the first run's judge about all pairs of the first and each other run, and print the estimate before.

    Cost counts against the first run's configuration: its budget, its ledger and its reply cache.

    Raises:
        ConfigError: the runs share no prompt and seed, show other subjects, or were not judged.
        StillPending: a batch job is not finished.

    """
    from tasks.mini.vision_server.launch import LocalServer
    from tasks.scoring.pairwise.models import judge_pairs
    from tasks.services.llm.budget.ledger import Ledger
    from tasks.services.llm.service import LlmService, LocalServices
    from tasks.stage.cache import StageFolder

    first = compared[0]
    config, folder = first.run.config, first.folder
    plans = plan(compared, rows)
    print_estimate(first, list(plans.values()))
    server = LocalServer(folder / "vision-server.log")
    llm = LlmService(
        config.llm,
        store=first.store,
        ledger=Ledger(folder / "ledger.jsonl"),
        budget=open_budget(config, folder.parent),
        local=LocalServices(start_server=server.start, batch_folder=folder.parent / "work" / "batches"),
    )
    # Batch jobs lie beside those of the run's own scoring, where `likeness jobs` and `likeness gc` look.
    stage = StageFolder(first.store, "scoring", first.run.find_stage_key("scoring"))
    show = show_once()
    try:
        return [
            Judged(name, first.name, judge_pairs(config.scoring, planned, llm=llm, folder=stage, on_progress=show))
            for name, planned in plans.items()
        ]
    except StillPending as error:
        raise StillPending("the judge's batch job is not finished; run the same command again to resume it") from error
    finally:
        llm.close()
        server.stop()


def show_once() -> Callable[[int, int], None]:
    """Return a callback that prints each number once: a batch job is polled several times a second."""
    shown: set[tuple[int, int]] = set()

    def show(done: int, total: int) -> None:
        if (done, total) not in shown:
            shown.add((done, total))
            show_progress(done, total, name="judge")

    return show


def plan(compared: Sequence[Compared], rows: Sequence[Row]) -> dict[str, "PlannedPairs"]:
    """Return the pairs of the first and each other run, with requests, by name. Raises ConfigError."""
    from tasks.scoring.pairwise.models import ModelPair, plan_pairs

    first = compared[0]
    if "scoring" not in first.run.summary.stages:
        raise ConfigError(f"run {first.name} was not judged: name one first whose judge is to choose")
    for other in compared[1:]:
        if other.candidate.photos != first.candidate.photos:
            raise ConfigError(f"--judge: {other.name} was tuned on other photos than {first.name}: leave --judge out")
    if not rows:
        raise ConfigError("--judge: the runs share no prompt and seed: leave --judge out")
    context = make_context(compared)
    return {
        other.name: plan_pairs(
            context, [ModelPair(row.template, row.samples[0], row.samples[number]) for row in rows]
        )
        for number, other in enumerate(compared[1:], 1)
    }  # fmt: skip


def make_context(compared: Sequence[Compared]) -> "JudgeContext":
    """Return the first run's photos, and how samples of all runs are read. Raises ConfigError for missing photos."""
    from tasks.images import shrink_png
    from tasks.scoring.judge_requests import JudgeContext
    from tasks.stage.cache import find_manifest, read_verified

    first = compared[0]
    config = first.run.config.scoring
    subject = find_manifest(first.store, SubjectSet, stage="subject", key=first.run.find_stage_key("subject"))
    if subject is None:
        raise ConfigError(f"the photos of {first.name} are missing from the store; run it again")
    owners = {
        (sample.image.key, sample.image.sha256): each
        for each in compared
        for sample in each.candidate.evaluation.samples
    }

    def read(sample: Sample) -> bytes:
        return shrink_png(owners[sample.image.key, sample.image.sha256].read(sample), max_side=config.max_side)

    references = [read_verified(first.store, image.image) for image in subject.images[: config.num_reference_images]]
    return JudgeContext(
        class_noun=subject.class_noun,
        references=[shrink_png(data, max_side=config.max_side) for data in references],
        samples=[],
        others=[],
        read=read,
        evidence=config.evidence,
    )


def print_estimate(first: Compared, plans: Sequence["PlannedPairs"]) -> None:
    """Print how many requests the judge gets, and their cost where none is cached."""
    from tasks.services.llm.budget.cost_estimate import estimate_calls

    config = first.run.config
    found = [estimate_calls(config.llm, planned.estimated(config.scoring, config.llm)) for planned in plans]
    expected, worst = ([getattr(each, name) for each in found] for name in ("expected_usd", "worst_usd"))
    costs = [None if None in each else sum(each) for each in (expected, worst)]
    num, way = sum(each.calls for each in found), " by batch job" if any(each.is_batch for each in found) else ""
    print(
        f"judge {found[0].profile}: {num} requests{way}, expected {show_usd(costs[0])} USD, at most "
        f"{show_usd(costs[1])} USD; cached replies cost nothing",
        file=sys.stderr,
    )
