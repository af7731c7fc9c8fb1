"""Does what the server's automations have missed: `python -m flows.cli.stack.watchdog [--stamp FILE]`.

Crashed runs are scheduled again. On SQLite, prefect 3.8.8 drops the event of a crash where its database is locked at
that moment: the transaction of `reactive_evaluation` reads before it writes, which SQLite refuses without waiting, and
after three more attempts the event, and those that follow it, are left for 15 minutes.

Runs without heartbeats are marked crashed. An automation forgets what it waits for when it is replaced, for example by
the `likeness up` of a newer version after the machine of a run died.

So are pending runs whose worker was lost before it began them. They send no heartbeat that could be missed, and would
take up the pool's places for ever.
"""

import argparse
import datetime
import logging
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.stack.registration import TAG, find_heartbeat_window
from tasks.errors import first_line

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas import OrchestrationResult
    from prefect.client.schemas.objects import FlowRun

POLL_SECONDS = 15.0
GRACE = datetime.timedelta(seconds=45)
"""How long the automation has."""
MAX_AGE = datetime.timedelta(hours=1)
"""Runs that crashed earlier were left crashed: a person resumes them."""
PAGE = 200
LOST_GRACE = datetime.timedelta(seconds=90)
"""The same for a missing heartbeat: the automation acts up to 60 s after its window, even on what was done since."""
PENDING_GRACE = datetime.timedelta(minutes=3)
"""For the process that a worker had started to begin its run, though the worker is gone."""
CLAIM_GRACE = datetime.timedelta(minutes=15)
"""For a worker to write its name on a run that it takes, which is its next request."""
CREATED_GRACE = datetime.timedelta(hours=1)
"""For a container that was maybe created."""
CLOCKS_APART = datetime.timedelta(days=1)
SLEPT_SECONDS = 4 * POLL_SECONDS
"""A longer pause between two looks: this machine was suspended, and living runs could send no heartbeat."""
log = logging.getLogger("likeness.watchdog")


@dataclass
class Watch:
    """Since when heartbeats could arrive: the server answers, and this machine is awake."""

    window: datetime.timedelta
    since: datetime.datetime | None = None

    def note(self, now: datetime.datetime, *, is_answering: bool = True, slept: float = 0.0) -> None:
        """Note one look at the server, and how long the pause before it was, in seconds of the wall clock."""
        if not is_answering or slept > SLEPT_SECONDS:
            self.since = None
        elif self.since is None:
            self.since = now

    def has_waited(self, now: datetime.datetime) -> bool:
        """Whether a heartbeat that is missing now is not merely late."""
        return self.since is not None and now - self.since >= self.window


def read_runs(client: "SyncPrefectClient", kind: str) -> "list[FlowRun]":
    """Return runs of our deployments whose state is of a type."""
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        FlowRunFilterTags,
    )
    from prefect.client.schemas.objects import StateType

    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType(kind)])),
        tags=FlowRunFilterTags(all_=[TAG]),
    )
    found = client.read_flow_runs(flow_run_filter=wanted, limit=PAGE)
    return [run for run in found if run.deployment_id is not None and run.state is not None]


def find_missed(client: "SyncPrefectClient", now: datetime.datetime) -> "list[FlowRun]":
    """Return runs of deployments that crashed a while ago and were not scheduled again."""
    from flows.runs.attempts import MAX_ATTEMPTS

    return [
        run
        for run in read_runs(client, "CRASHED")
        if run.run_count <= MAX_ATTEMPTS and run.state is not None and GRACE <= now - run.state.timestamp <= MAX_AGE
    ]


def reschedule(client: "SyncPrefectClient", now: datetime.datetime) -> int:
    """Schedule missed runs again; return how many."""
    from prefect.states import Scheduled

    runs = find_missed(client, now)
    for run in runs:
        client.set_flow_run_state(run.id, Scheduled(message="rescheduled after a crash: it resumes"))
        log.warning("the automation missed the crash of %s: it is scheduled again", run.name)
    return len(runs)


def mark_lost(client: "SyncPrefectClient", now: datetime.datetime, window: datetime.timedelta) -> int:
    """Mark runs of deployments crashed whose process or worker is gone, or cancelled where they should stop.

    Returns how many. A run about which the server refuses to tell costs only itself.
    """
    import httpx
    from prefect.exceptions import PrefectException

    lost = 0
    for run in [run for kind in ("RUNNING", "CANCELLING", "PENDING") for run in read_runs(client, kind)]:
        try:
            if run.state_type == "PENDING":
                if is_abandoned(client, run, now):
                    lost += end_lost(client, run, "its worker was lost before it began")
            elif is_lost(client, run, now, window=window):
                lost += end_lost(client, run, "no heartbeat: its process is gone")
        except (httpx.HTTPStatusError, PrefectException, LookupError, ValueError) as error:
            log.warning("%s: %s", run.name, first_line(error))
    return lost


def is_abandoned(client: "SyncPrefectClient", run: "FlowRun", now: datetime.datetime) -> bool:
    """Whether a pending run's worker is gone, and nothing else can begin it."""
    import httpx

    waited = now - run.state.timestamp if run.state is not None else datetime.timedelta(0)
    name, pool = run.labels.get("prefect.worker.name"), run.labels.get("prefect.work-pool.name")
    if name is None or pool is None:
        return waited >= CLAIM_GRACE
    # A container or pod that was created outlives its worker: it may still be fetching its image, or wait for a GPU.
    # Of a later attempt nothing says whether it was: the server keeps the name of the first one's.
    is_created = run.infrastructure_pid and run.labels.get("prefect.worker.type") != "process"
    if waited < PENDING_GRACE or (is_created and (run.run_count == 0 or waited < CREATED_GRACE)):
        return False
    try:
        workers = client.read_workers_for_work_pool(str(pool))
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.NOT_FOUND:
            raise
        return True  # the pool was deleted, its workers with it
    return not any(worker.name == name and worker.status == "ONLINE" for worker in workers)


def is_lost(client: "SyncPrefectClient", run: "FlowRun", now: datetime.datetime, *, window: datetime.timedelta) -> bool:
    """Whether a run's last heartbeat is too old."""
    limit = now - window - LOST_GRACE
    if run.state is None or run.state.timestamp >= limit:
        return False
    last = find_heartbeat(client, run.id, since=run.start_time or run.state.timestamp, until=now)
    # Without any, its heartbeats are switched off, and nothing is known.
    return last is not None and last < limit


def end_lost(client: "SyncPrefectClient", run: "FlowRun", reason: str) -> bool:
    """Mark a lost run, unless its state has changed since it was read; return whether the server agreed."""
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.responses import SetStateStatus
    from prefect.states import Cancelled, Crashed

    current = client.read_flow_run(run.id).state
    if run.state is None or current is None or current.id != run.state.id:
        return False
    make = Cancelled if current.type == StateType.CANCELLING else Crashed
    # Not forced: the server refuses to change a state that became final meanwhile.
    done: OrchestrationResult[Any] = client.set_flow_run_state(run.id, make(message=reason))
    if done.status != SetStateStatus.ACCEPT:
        return False
    log.warning("%s is marked %s: %s", run.name, make.__name__.lower(), reason)
    return True


def find_heartbeat(
    client: "SyncPrefectClient", flow_run_id: uuid.UUID, *, since: datetime.datetime, until: datetime.datetime
) -> datetime.datetime | None:
    """Return when the server received a run's newest heartbeat; None where there is none."""
    # By the clock of the run's machine, which may be off: a day covers any time zone that is wrong.
    first, last = since - CLOCKS_APART, until + CLOCKS_APART
    wanted = {
        "occurred": {"since": first.isoformat(), "until": last.isoformat()},
        "event": {"name": ["prefect.flow-run.heartbeat"]},
        "resource": {"id": [f"prefect.flow-run.{flow_run_id}"]},
    }
    found = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 50}).json()["events"]
    # Not the first one: after a clock was set back, later heartbeats are older by it.
    return max((datetime.datetime.fromisoformat(event["received"]) for event in found), default=None)


def look(client: "SyncPrefectClient", watch: Watch, *, slept: float = 0.0) -> bool:
    """Do once what the automations have missed; return whether the server let it. It is asked again the next time."""
    import httpx
    from prefect.exceptions import PrefectException

    now = datetime.datetime.now(datetime.UTC)
    try:
        reschedule(client, now)
        watch.note(now, slept=slept)
        if watch.has_waited(now):
            mark_lost(client, now, watch.window)
        return True
    except httpx.TransportError as error:
        watch.note(now, is_answering=False)
        log.warning("the server does not answer: %s", type(error).__name__)
    except (httpx.HTTPError, PrefectException, OSError, LookupError, ValueError) as error:
        log.warning("the server's answer is of no use: %s", first_line(error))
    return False


def main() -> None:
    """Look every few seconds, for ever; for health checks, touch the stamp after each look that succeeded."""
    from prefect.client.orchestration import get_client

    parser = argparse.ArgumentParser(prog="python -m flows.cli.stack.watchdog")
    parser.add_argument("--stamp", type=Path)
    stamp: Path | None = parser.parse_args().stamp
    logging.basicConfig(format="%(asctime)s %(message)s")
    watch = Watch(find_heartbeat_window())
    with get_client(sync_client=True) as client:
        slept = 0.0
        while True:
            is_done = look(client, watch, slept=slept)
            if is_done and stamp is not None:
                stamp.touch()
            begun = time.time()
            time.sleep(POLL_SECONDS)
            slept = time.time() - begun


if __name__ == "__main__":
    main()
