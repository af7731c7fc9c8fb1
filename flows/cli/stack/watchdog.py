"""Schedules crashed runs again that the server's automation has missed: `python -m flows.cli.stack.watchdog`.

On SQLite, prefect 3.8.8 drops the event of a crash where its database is locked at that moment: the transaction of
`reactive_evaluation` reads before it writes, which SQLite refuses without waiting, and after three more attempts the
event, and those that follow it, are left for 15 minutes.
"""

import datetime
import logging
import time
from typing import TYPE_CHECKING

from flows.cli.stack.registration import TAG

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

POLL_SECONDS = 15.0
GRACE = datetime.timedelta(seconds=45)
"""How long the automation has."""
MAX_AGE = datetime.timedelta(hours=1)
"""Runs that crashed earlier were left crashed: a person resumes them."""
PAGE = 200
log = logging.getLogger("likeness.watchdog")


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


def main() -> None:
    """Look every few seconds, for ever; a server that is away is asked again."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectException

    logging.basicConfig(format="%(asctime)s %(message)s")
    with get_client(sync_client=True) as client:
        while True:
            try:
                reschedule(client, datetime.datetime.now(datetime.UTC))
            except (httpx.HTTPError, PrefectException, OSError) as error:
                log.warning("the server does not answer: %s", type(error).__name__)
            time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
