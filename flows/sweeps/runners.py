"""How a trial's runs are executed: in this process, or as sub-runs on a work pool."""

import contextlib
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from conf.compose import compile_request, compute_config_digest
from conf.request import RunRequest
from flows.runs.records import list_run_folders, read_summary, resolve_paths
from flows.sweeps.pruning import PruningProgress, TrialPruned, ValidationTail
from tasks.errors import LikenessError
from tasks.manifests.run_summary import RunSummary

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

DEPLOYMENT = "personalize-subject/personalize-subject"
POLL_SECONDS = 2.0
CRASH_SECONDS = 90.0
"""How long a crashed sub-run may wait for the automation that schedules it again."""
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


class PoolRunner:
    """Runs as sub-runs of the sweep on a work pool; its workers decide which of them share a machine."""

    def __init__(self, capacity: int, *, deployment: str = DEPLOYMENT) -> None:
        self.capacity = capacity
        self.deployment = deployment

    def start(self, order: RunOrder) -> ActiveRun:
        """Send the run to the work pool, or find the one of this name."""
        from prefect.deployments import run_deployment

        from flows.runs.artifacts import NAMED

        request = anchor(order.request)
        run = run_deployment(
            self.deployment,
            parameters={"request": request.model_dump(mode="json", exclude_unset=True)},
            timeout=0,
            idempotency_key=order.name,
            flow_run_name=order.name,
            tags=["likeness", "sweep", NAMED],
        )
        assert not isinstance(run, Coroutine)  # one only within an event loop
        return PoolRun(run.id, request, order)


class PoolRun:
    """A sub-run on a work pool."""

    def __init__(self, run_id: uuid.UUID, request: RunRequest, order: RunOrder) -> None:
        self.run_id = run_id
        self.request = request
        self.started = time.time()
        self.crashed_at: float | None = None
        self.is_pruned = False
        self.tail = None if order.should_prune is None else ValidationTail(compile_request(request), order.should_prune)

    def poll(self) -> RunOutcome | None:
        """Return the outcome; a pruned run is cancelled, which saves its training."""
        with make_client() as client:
            run = client.read_flow_run(self.run_id)
            if self.tail is not None and not self.is_pruned and not is_final(run) and self.tail.read():
                self.is_pruned = True
                request_cancel(client, run)
        if not self.has_ended(run):
            return None
        state = run.state
        assert state is not None
        if state.is_completed():
            summary = find_summary(self.request)
            if summary is not None:
                return RunOutcome(summary, cost_usd=summary.cost_usd)
            reason = f"sub-run {run.name} left no summary in output_dir; workers must share it with the sweep"
            return RunOutcome(error=reason)
        reason = (
            self.tail.reason if self.is_pruned and self.tail else f"sub-run {run.name}: {state.message or state.name}"
        )
        return RunOutcome(error=reason, is_pruned=self.is_pruned, cost_usd=find_cost(self.request, self.started))

    def has_ended(self, run: "FlowRun") -> bool:
        """Whether a run has ended; a crashed one is given time to be scheduled again."""
        if not is_final(run):
            self.crashed_at = None
            return False
        if run.state is None or not run.state.is_crashed():
            return True
        self.crashed_at = self.crashed_at or time.monotonic()
        return time.monotonic() - self.crashed_at > CRASH_SECONDS

    def cancel(self) -> None:
        """Cancel the sub-run; one that can't be cancelled is found again by its name when the sweep resumes."""
        with contextlib.suppress(Exception), make_client() as client:
            run = client.read_flow_run(self.run_id)
            if not is_final(run):
                request_cancel(client, run)


def make_client() -> "SyncPrefectClient":
    """Return a client of the Prefect server that runs this flow."""
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)


def is_final(run: "FlowRun") -> bool:
    """Whether a flow run has ended."""
    return run.state is not None and run.state.is_final()


def request_cancel(client: "SyncPrefectClient", run: "FlowRun") -> None:
    """Ask the worker to cancel a run."""
    from prefect.states import Cancelling

    client.set_flow_run_state(run.id, Cancelling(message="cancelled by its sweep"))


def anchor(request: RunRequest) -> RunRequest:
    """Return a request with folders as absolute paths: a worker has another working directory."""
    config = compile_request(request)
    settings = {**request.settings, "output_dir": str(Path(config.output_dir).absolute())}
    for name, value in (("subject.source", config.subject.source), ("store.folder", config.store.folder)):
        is_set = name in settings or (name == "subject.source" and request.source is not None)
        if is_set and value != "demo" and not value.startswith("store:"):
            settings[name] = str(Path(value).expanduser().absolute())
    changes: dict[str, object] = {"settings": settings}
    if request.source is not None:
        changes["source"] = settings.pop("subject.source", request.source)
    return request.model_copy(update=changes)


def find_pool(num_parallel: int) -> PoolRunner | None:
    """Return a runner on the work pool of the deployment; None where it has no online worker, or isn't deployed."""
    from prefect.exceptions import ObjectNotFound

    with make_client() as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
            workers = client.read_workers_for_work_pool(deployment.work_pool_name or "")
        except ObjectNotFound:
            return None
    is_online = any(str(getattr(worker.status, "value", worker.status)) == "ONLINE" for worker in workers)
    return PoolRunner(num_parallel) if is_online else None
