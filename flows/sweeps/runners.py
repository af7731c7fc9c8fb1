"""How a trial's runs are executed, and how in this process; `pool.py` has those on a work pool."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from conf.compose import compile_request, compute_config_digest
from conf.request import RunRequest
from flows.runs.records import list_run_folders, read_summary, resolve_paths
from flows.sweeps.pruning import PruningProgress, TrialPruned, ValidationTail
from tasks.errors import LikenessError
from tasks.manifests.run_summary import RunSummary

POLL_SECONDS = 2.0
ShouldPrune = Callable[[int, float, float | None], bool]
"""Called with step, loss and similarity of each validation; True stops the run."""


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended: with a summary, pruned, or with an error."""

    summary: RunSummary | None = None
    error: str = ""
    is_pruned: bool = False
    cost_usd: float | None = 0.0
    """None where a price is unknown."""


@dataclass(frozen=True)
class RunOrder:
    """One run of a trial."""

    request: RunRequest
    name: str
    """Of the sub-run; the same name is the same sub-run, so that a resumed sweep finds the one that still runs."""
    should_prune: ShouldPrune | None = None


class ActiveRun(Protocol):
    """A run that was started."""

    def poll(self) -> RunOutcome | None:
        """Return the outcome; None while the run is at work."""

    def cancel(self) -> None:
        """Stop the run where it is still at work."""


class Runner(Protocol):
    """Starts runs."""

    capacity: int
    """How many may be at work at once."""

    def start(self, order: RunOrder) -> ActiveRun:
        """Start a run."""


@dataclass(frozen=True)
class EndedRun:
    """A run that had ended when `start` returned."""

    outcome: RunOutcome

    def poll(self) -> RunOutcome | None:
        """Return the outcome."""
        return self.outcome

    def cancel(self) -> None:
        """Do nothing."""


class LocalRunner:
    """Runs in this process, one at a time: two trainings would share a GPU's memory."""

    capacity = 1

    def __init__(self, run: Callable[[RunRequest], RunSummary]) -> None:
        self.run = run

    def start(self, order: RunOrder) -> ActiveRun:
        """Run to the end."""
        started = time.time()
        try:
            with watch_validation(order):
                summary = self.run(order.request)
        except TrialPruned as error:
            return EndedRun(RunOutcome(error=str(error), is_pruned=True, cost_usd=find_cost(order.request, started)))
        # Anything else, such as Ctrl-C, ends the sweep.
        except LikenessError as error:
            return EndedRun(RunOutcome(error=str(error), cost_usd=find_cost(order.request, started)))
        return EndedRun(RunOutcome(summary, cost_usd=summary.cost_usd))


@contextmanager
def watch_validation(order: RunOrder) -> Iterator[None]:
    """Let the run's training ask after each validation whether the trial is pruned."""
    if order.should_prune is None:
        yield
        return
    from flows.runs.context import progress_of_run
    from flows.runs.log import make_run_progress

    tail = ValidationTail(compile_request(order.request), order.should_prune)
    shared = progress_of_run.get()
    view = shared or make_run_progress()
    token = progress_of_run.set(PruningProgress(view, tail))
    try:
        yield
    finally:
        progress_of_run.reset(token)
        if shared is None:
            view.close()


def find_cost(request: RunRequest, since: float) -> float | None:
    """Return what the runs of a request have spent since a Unix time: a run that failed has no cost in its summary."""
    from tasks.services.llm.budget.ledger import read_rows

    config = compile_request(request)
    digest = compute_config_digest(config)
    total = 0.0
    for folder in reversed(list_run_folders(Path(config.output_dir))):
        ledger = folder / "ledger.jsonl"
        if folder.stat().st_mtime < since - 1:
            break
        if read_summary(folder).config_digest != digest or not ledger.is_file():
            continue
        for row in read_rows(ledger):
            if row is None or (row.cost_usd is None and row.outcome != "cached"):
                return None
            total += 0.0 if row.outcome == "cached" else row.cost_usd or 0.0
    return total


def find_summary(request: RunRequest) -> RunSummary | None:
    """Return the newest finished run of a request."""
    config = compile_request(request)
    digest = compute_config_digest(config)
    for folder in reversed(list_run_folders(Path(config.output_dir))):
        summary = read_summary(folder)
        if summary.status == "finished" and summary.config_digest == digest:
            return resolve_paths(summary, folder)
    return None
