"""Trials as sub-runs on a work pool; a sweep that is itself a run of the pool never waits for ever for its slots."""

import contextlib
import itertools
import time
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING

from conf.compose import compile_request
from conf.request import RunRequest
from flows.sweeps.pruning import ValidationTail
from flows.sweeps.runners import ActiveRun, LocalRunner, Runner, RunOrder, RunOutcome, find_cost, find_summary
from flows.sweeps.tracking import note

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

DEPLOYMENT = "personalize-subject/personalize-subject"
SWEEP_FLOW = "sweep-settings"
NO_POOL = "--parallel: no work pool with a worker is reachable (`likeness up` starts one); trials run one at a time"
CRASH_SECONDS = 90.0
"""How long a crashed sub-run may wait for the automation that schedules it again."""
START_SECONDS = 60.0
"""How long a sweep that holds a slot of the pool waits until one of its sub-runs is at work."""


class PoolRunner:
    """Runs as sub-runs of the sweep on a work pool; its workers decide which of them share a machine."""

    def __init__(self, capacity: int, *, fallback: LocalRunner | None = None, deployment: str = DEPLOYMENT) -> None:
        """Prepare for `capacity` sub-runs.

        Args:
            capacity: how many may be at work at once.
            fallback: takes a sub-run where none gets a slot of the pool; of a sweep that holds such a slot itself.
            deployment: of the sub-runs.

        """
        self.capacity = capacity
        self.fallback = fallback
        self.deployment = deployment
        self.working: set[uuid.UUID] = set()
        """Sub-runs that were at work when they were last looked at."""
        self.idle_since: float | None = None

    def start(self, order: RunOrder) -> ActiveRun:
        """Send the run to the work pool, or find the one of this name."""
        request = anchor(order.request)
        if not self.working:  # what passed since the last one ended was no wait for a slot
            self.idle_since = None
        for number in itertools.count():
            run = self.send(request, order.name, key=f"{order.name}-{number}" if number else order.name)
            # One that was cancelled with an interrupted sweep does not start again; one that still saves its training
            # keeps its lease until then.
            if run.state is None or not (run.state.is_cancelled() or run.state.is_cancelling()):
                break
        return PoolRun(run.id, request, order, runner=self)

    def send(self, request: RunRequest, name: str, *, key: str) -> "FlowRun":
        """Create a sub-run, or return the one of a key."""
        from prefect.deployments import run_deployment

        from flows.runs.artifacts import NAMED

        run = run_deployment(
            self.deployment,
            parameters={"request": request.model_dump(mode="json", exclude_unset=True)},
            timeout=0,
            idempotency_key=key,
            flow_run_name=name,
            tags=["likeness", "sweep", NAMED],
        )
        assert not isinstance(run, Coroutine)  # one only within an event loop
        return run

    def is_starved(self, run: "FlowRun") -> bool:
        """Note whether a sub-run is at work; return whether it waits, and none was at work for START_SECONDS.

        Its workers may be busy for long, or this sweep, and others like it, hold all slots that the sub-runs need.
        """
        is_waiting = run.state is not None and run.state.is_scheduled()
        if is_waiting or is_final(run):
            self.working.discard(run.id)
        else:
            self.working.add(run.id)
        now = time.monotonic()
        if self.working or self.idle_since is None:
            self.idle_since = now
        return is_waiting and now - self.idle_since > START_SECONDS


class PoolRun:
    """A sub-run on a work pool."""

    def __init__(self, run_id: uuid.UUID, request: RunRequest, order: RunOrder, *, runner: PoolRunner) -> None:
        self.run_id = run_id
        self.request = request
        self.order = order
        self.runner = runner
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
            is_starved = not self.is_pruned and self.runner.is_starved(run)
            fallback = self.runner.fallback if is_starved else None
            if fallback is not None:
                request_cancel(client, run)
        if fallback is not None:
            return self.run_here(fallback)
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

    def run_here(self, fallback: LocalRunner) -> RunOutcome | None:
        """Run to the end in this process; a worker that takes the sub-run all the same waits for this one's leases."""
        note(
            f"sub-run {self.order.name} got no slot of its pool in {START_SECONDS:g} s: it runs in the sweep's process"
        )
        outcome = fallback.start(self.order).poll()
        self.runner.idle_since = None
        return outcome

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


def choose_runner(num_parallel: int, local: LocalRunner, *, is_deployed: bool) -> Runner:
    """Return a runner on a work pool where several trials are wanted at once, else this process's.

    A deployed sweep holds a slot of its pool. Sweeps never hold all slots and wait for one: the last of them runs its
    trials itself. It is only to look at the pool once: a limit that is lowered later leads to `PoolRun.run_here`.
    """
    if num_parallel == 1:
        return local
    with make_client() as client:
        pool = find_pool(client)
        if pool is None:
            note(NO_POOL)
            return local
        limit = find_limit(client) if is_deployed else None
        if limit is not None and limit - count_sweeps(client, pool) < 1:
            note(f"sweeps hold all {limit} slots of the pool {pool}: trials run in this process, one at a time")
            return local
    return PoolRunner(num_parallel, fallback=local if is_deployed else None)


def find_pool(client: "SyncPrefectClient") -> str | None:
    """Return the work pool of the deployment; None where it has no online worker, or isn't deployed."""
    from prefect.exceptions import ObjectNotFound

    try:
        pool = client.read_deployment_by_name(DEPLOYMENT).work_pool_name or ""
        workers = client.read_workers_for_work_pool(pool)
    except ObjectNotFound:
        return None
    is_online = any(str(getattr(worker.status, "value", worker.status)) == "ONLINE" for worker in workers)
    return pool if is_online else None


def find_limit(client: "SyncPrefectClient") -> int | None:
    """Return how many runs of the deployment's pool and queue are at work at once; None: without limit."""
    deployment = client.read_deployment_by_name(DEPLOYMENT)
    limits = [client.read_work_pool(deployment.work_pool_name or "").concurrency_limit]
    if deployment.work_queue_name:
        queue = client.read_work_queue_by_name(deployment.work_queue_name, work_pool_name=deployment.work_pool_name)
        limits.append(queue.concurrency_limit)
    return min((limit for limit in limits if limit is not None), default=None)


def count_sweeps(client: "SyncPrefectClient", pool: str) -> int:
    """Return how many sweeps hold a slot of a pool."""
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType

    holding = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    found = client.read_flow_runs(
        flow_filter=filters.FlowFilter(name=filters.FlowFilterName(any_=[SWEEP_FLOW])),
        flow_run_filter=filters.FlowRunFilter(
            state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=holding))
        ),
        work_pool_filter=filters.WorkPoolFilter(name=filters.WorkPoolFilterName(any_=[pool])),
    )
    return len(found)
