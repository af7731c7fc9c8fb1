"""Does what the server's automations have missed: `python -m flows.cli.stack.watchdog`.

Crashed runs are scheduled again. On SQLite, prefect 3.8.8 drops the event of a crash where its database is locked at
that moment: the transaction of `reactive_evaluation` reads before it writes, which SQLite refuses without waiting, and
after three more attempts the event, and those that follow it, are left for 15 minutes.

Runs without heartbeats are marked crashed. An automation forgets what it waits for when it is replaced, for example by
the `likeness up` of a newer version after the machine of a run died.
"""

import datetime
import logging
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.cli.stack.registration import TAG, find_heartbeat_window

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

POLL_SECONDS = 15.0
GRACE = datetime.timedelta(seconds=45)
"""How long the automation has."""
MAX_AGE = datetime.timedelta(hours=1)
"""Runs that crashed earlier were left crashed: a person resumes them."""
PAGE = 200
SLEPT_SECONDS = 4 * POLL_SECONDS
"""A longer pause between two looks: this machine was suspended, and living runs could send no heartbeat."""
log = logging.getLogger("likeness.watchdog")


@dataclass
class Watch:
    """Since when heartbeats could arrive: the server answers, and this machine is awake."""

    window: datetime.timedelta
    since: datetime.datetime | None = None
    seen: datetime.datetime | None = None

    def note(self, now: datetime.datetime, *, is_answering: bool) -> None:
        """Note one look at the server."""
        has_slept = self.seen is not None and (now - self.seen).total_seconds() > SLEPT_SECONDS
        if not is_answering or has_slept:
            self.since = None
        elif self.since is None:
            self.since = now
        self.seen = now

    def has_waited(self, now: datetime.datetime) -> bool:
        """Whether a heartbeat that is missing now is not merely late."""
        return self.since is not None and now - self.since >= self.window


def find_missed(client: "SyncPrefectClient", now: datetime.datetime) -> "list[FlowRun]":
    """Return runs of deployments that crashed a while ago and were not scheduled again."""
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        FlowRunFilterTags,
    )
    from prefect.client.schemas.objects import StateType

    from flows.runs.attempts import MAX_ATTEMPTS

    crashed = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])),
        tags=FlowRunFilterTags(all_=[TAG]),
    )
    found = client.read_flow_runs(flow_run_filter=crashed, limit=PAGE)
    return [
        run
        for run in found
        if run.deployment_id is not None
        and run.run_count <= MAX_ATTEMPTS
        and run.state is not None
        and GRACE <= now - run.state.timestamp <= MAX_AGE
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
    """Mark runs of deployments crashed whose last heartbeat is too old, or cancelled where they should stop.

    Returns how many.
    """
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        FlowRunFilterTags,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.states import Cancelled, Crashed

    ends = {StateType.RUNNING: Crashed, StateType.CANCELLING: Cancelled}
    running = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[*ends])),
        tags=FlowRunFilterTags(all_=[TAG]),
    )
    lost = 0
    for run in client.read_flow_runs(flow_run_filter=running, limit=PAGE):
        if run.deployment_id is None or run.state is None or now - run.state.timestamp <= window + GRACE:
            continue
        last = find_heartbeat(client, run.id, since=run.start_time or run.state.timestamp, until=now)
        # Without any, its heartbeats are switched off, and nothing is known.
        if last is not None and now - last > window + GRACE:
            state: State[Any] = ends[run.state.type](message="no heartbeat: its process is gone")
            client.set_flow_run_state(run.id, state, force=True)
            log.warning("the automation missed that %s sends no heartbeat: it is marked %s", run.name, state.name)
            lost += 1
    return lost


def find_heartbeat(
    client: "SyncPrefectClient", flow_run_id: uuid.UUID, *, since: datetime.datetime, until: datetime.datetime
) -> datetime.datetime | None:
    """Return the time of a run's newest heartbeat; None where there is none."""
    wanted = {
        "occurred": {"since": since.isoformat(), "until": until.isoformat()},
        "event": {"name": ["prefect.flow-run.heartbeat"]},
        "resource": {"id": [f"prefect.flow-run.{flow_run_id}"]},
    }
    found = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 1}).json()["events"]
    return datetime.datetime.fromisoformat(found[0]["occurred"]) if found else None


def main() -> None:
    """Look every few seconds, for ever; a server that is away is asked again."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectException

    logging.basicConfig(format="%(asctime)s %(message)s")
    watch = Watch(find_heartbeat_window())
    with get_client(sync_client=True) as client:
        while True:
            now = datetime.datetime.now(datetime.UTC)
            try:
                reschedule(client, now)
                watch.note(now, is_answering=True)
                if watch.has_waited(now):
                    mark_lost(client, now, watch.window)
            except (httpx.HTTPError, PrefectException, OSError) as error:
                watch.note(now, is_answering=False)
                log.warning("the server does not answer: %s", type(error).__name__)
            time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
