"""The watchdog schedules crashed runs again that the automation has missed, and leaves all others alone."""

import datetime
import time
import uuid
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Crashed, Pending

from flows.cli.stack import watchdog
from flows.cli.stack.registration import TAG
from flows.cli.stack.watchdog import (
    CLAIM_GRACE,
    CREATED_GRACE,
    GRACE,
    LOST_GRACE,
    MAX_AGE,
    PENDING_GRACE,
    SLEPT_SECONDS,
    Watch,
    find_heartbeat,
    mark_lost,
    reschedule,
)
from flows.runs.attempts import MAX_ATTEMPTS

LATE = GRACE + datetime.timedelta(seconds=5)


def make_run(
    client: SyncPrefectClient, *, tags: list[str], has_deployment: bool = True, state: str = "RUNNING"
) -> uuid.UUID:
    flow = client._client.post("/flows/", json={"name": "personalize-subject"}).json()["id"]
    if not has_deployment:
        body = {"flow_id": flow, "tags": tags, "state": {"type": "RUNNING"}}
        return uuid.UUID(client._client.post("/flow_runs/", json=body).raise_for_status().json()["id"])
    deployment = client._client.post("/deployments/", json={"name": str(uuid.uuid4()), "flow_id": flow}).json()["id"]
    body = {"tags": tags, "state": {"type": state}}
    made = client._client.post(f"/deployments/{deployment}/create_flow_run", json=body).raise_for_status().json()
    return uuid.UUID(made["id"])


def read_type(client: SyncPrefectClient, run: uuid.UUID) -> StateType | None:
    return client.read_flow_run(run).state_type


def test_a_missed_crash_is_scheduled_again_after_its_grace(client: SyncPrefectClient) -> None:
    run = make_run(client, tags=[TAG])
    client.set_flow_run_state(run, Crashed(), force=True)
    now = datetime.datetime.now(datetime.UTC)
    assert reschedule(client, now) == 0, "the automation has its time"
    assert reschedule(client, now + LATE) == 1
    assert read_type(client, run) == StateType.SCHEDULED
    assert reschedule(client, now + LATE) == 0


@pytest.mark.parametrize("case", ["other tag", "no deployment", "completed", "old", "crashed too often"])
def test_other_runs_are_left_alone(client: SyncPrefectClient, case: str) -> None:
    run = make_run(client, tags=["other" if case == "other tag" else TAG], has_deployment=case != "no deployment")
    if case == "crashed too often":
        for _ in range(MAX_ATTEMPTS + 1):
            for kind in ("CRASHED", "SCHEDULED", "PENDING", "RUNNING"):  # not forced: forced ones aren't counted
                client._client.post(f"/flow_runs/{run}/set_state", json={"state": {"type": kind}}).raise_for_status()
        assert client.read_flow_run(run).run_count > MAX_ATTEMPTS
    client.set_flow_run_state(run, Completed() if case == "completed" else Crashed(), force=True)
    before = read_type(client, run)
    late = MAX_AGE + GRACE if case == "old" else LATE
    reschedule(client, datetime.datetime.now(datetime.UTC) + late)
    assert read_type(client, run) == before


WINDOW, SECOND, MARGIN = (datetime.timedelta(seconds=seconds) for seconds in (90, 1, 30))


def send_heartbeat(client: SyncPrefectClient, run: uuid.UUID, at: datetime.datetime) -> None:
    """Send a heartbeat of a machine whose clock shows a time, and wait until the server has it."""
    begun = datetime.datetime.now(datetime.UTC)
    event = {
        "id": str(uuid.uuid4()),
        "occurred": at.isoformat(),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
    }
    client._client.post("/events", json=[event]).raise_for_status()
    for _ in range(100):  # events are stored in the background
        found = find_heartbeat(client, run, since=begun, until=begun)
        if found is not None and found >= begun:
            return
        time.sleep(0.1)
    raise AssertionError("the heartbeat was not stored")


def test_a_run_that_sends_no_heartbeat_any_more_is_marked_crashed(client: SyncPrefectClient) -> None:
    run = make_run(client, tags=[TAG])
    now = datetime.datetime.now(datetime.UTC)
    late = now + WINDOW + LOST_GRACE + MARGIN
    assert mark_lost(client, late, WINDOW) == 0, "it never sent one: they may be switched off"
    send_heartbeat(client, run, now)
    assert mark_lost(client, late - 2 * MARGIN, WINDOW) == 0, "the automation has its time"
    assert read_type(client, run) == StateType.RUNNING
    assert mark_lost(client, late, WINDOW) == 1
    assert read_type(client, run) == StateType.CRASHED
    assert mark_lost(client, late, WINDOW) == 0


def test_a_cancelled_run_whose_process_is_gone_is_not_scheduled_again(client: SyncPrefectClient) -> None:
    run = make_run(client, tags=[TAG])
    now = datetime.datetime.now(datetime.UTC)
    send_heartbeat(client, run, now)
    client.set_flow_run_state(run, State(type=StateType.CANCELLING))
    late = now + WINDOW + LOST_GRACE + MARGIN
    assert mark_lost(client, late, WINDOW) == 1
    assert read_type(client, run) == StateType.CANCELLED
    reschedule(client, late + LATE)
    assert read_type(client, run) == StateType.CANCELLED


@pytest.mark.parametrize("clock", [-10, 0, 10], ids=["clock behind", "same clock", "clock ahead"])
def test_a_run_whose_heartbeats_arrive_is_not_marked_crashed_whatever_its_clock(
    client: SyncPrefectClient, clock: int
) -> None:
    run = make_run(client, tags=[TAG])
    now = datetime.datetime.now(datetime.UTC)
    send_heartbeat(client, run, now)
    time.sleep(3)
    send_heartbeat(client, run, now + clock * (WINDOW + LOST_GRACE))
    assert mark_lost(client, now + 2 * SECOND + WINDOW + LOST_GRACE, WINDOW) == 0
    assert mark_lost(client, now + MARGIN + WINDOW + LOST_GRACE, WINDOW) == 1


class Pool:
    """A work pool whose workers are names that send heartbeats."""

    def __init__(self, client: SyncPrefectClient, kind: str = "process") -> None:
        self.client, self.kind, self.name = client, kind, str(uuid.uuid4())
        client._client.post("/work_pools/", json={"name": self.name, "type": kind}).raise_for_status()

    def beat(self, worker: str, *, interval: int = 600) -> None:
        body = {"name": worker, "heartbeat_interval_seconds": interval}
        self.client._client.post(f"/work_pools/{self.name}/workers/heartbeat", json=body).raise_for_status()

    def claim(self, worker: str | None, *, infrastructure: str | None = None) -> uuid.UUID:
        """Return a run that is pending, as a worker leaves it that has taken it."""
        run = make_run(self.client, tags=[TAG], state="SCHEDULED")
        self.client.set_flow_run_state(run, Pending(), force=True)
        if infrastructure is not None:
            self.client.update_flow_run(run, infrastructure_pid=infrastructure)
        if worker is not None:
            names = {"worker.name": worker, "worker.type": self.kind, "work-pool.name": self.name}
            self.client.update_flow_run_labels(run, {f"prefect.{key}": value for key, value in names.items()})
        return run


def test_a_run_that_its_lost_worker_never_began_is_marked_crashed(client: SyncPrefectClient) -> None:
    pool = Pool(client)
    pool.beat("there")
    pool.beat("lost", interval=1)
    kept, lost = pool.claim("there"), pool.claim("lost")
    now = datetime.datetime.now(datetime.UTC)
    assert mark_lost(client, now + PENDING_GRACE - MARGIN, WINDOW) == 0, "its process may begin without a worker"
    for _ in range(300):
        if mark_lost(client, now + PENDING_GRACE + MARGIN, WINDOW) == 1:
            break
        pool.beat("there")
        time.sleep(0.1)  # until the server notes that the worker's heartbeats have ended
    assert read_type(client, lost) == StateType.CRASHED
    assert read_type(client, kept) == StateType.PENDING
    assert mark_lost(client, now + 10 * CLAIM_GRACE, WINDOW) == 0
    reschedule(client, now + LATE)
    assert read_type(client, lost) == StateType.SCHEDULED


def test_the_container_of_a_lost_worker_may_still_begin_its_run(client: SyncPrefectClient) -> None:
    """Its image is large, or no GPU is free; only where it was never created is the run lost."""
    pool = Pool(client, "docker")
    created, missing = pool.claim("gone", infrastructure="container-1"), pool.claim("gone")
    assert mark_lost(client, datetime.datetime.now(datetime.UTC) + PENDING_GRACE + MARGIN, WINDOW) == 1
    assert [read_type(client, run) for run in (created, missing)] == [StateType.PENDING, StateType.CRASHED]
    of_process = Pool(client).claim("gone", infrastructure="host:1")
    assert mark_lost(client, datetime.datetime.now(datetime.UTC) + PENDING_GRACE + MARGIN, WINDOW) == 1
    assert read_type(client, of_process) == StateType.CRASHED


def test_what_is_left_of_an_earlier_attempt_says_little_of_a_later_one(client: SyncPrefectClient) -> None:
    """The server keeps the name of the first one's container."""
    run = Pool(client, "docker").claim("gone", infrastructure="container-1")
    for kind in ("RUNNING", "CRASHED", "SCHEDULED", "PENDING"):
        client._client.post(f"/flow_runs/{run}/set_state", json={"state": {"type": kind}}).raise_for_status()
    assert client.read_flow_run(run).run_count > 0
    now = datetime.datetime.now(datetime.UTC)
    assert mark_lost(client, now + CREATED_GRACE - MARGIN, WINDOW) == 0
    assert mark_lost(client, now + CREATED_GRACE + MARGIN, WINDOW) == 1


def test_with_its_pool_a_pending_run_is_lost(client: SyncPrefectClient) -> None:
    pool = Pool(client)
    pool.beat("there")
    run = pool.claim("there")
    client.delete_work_pool(pool.name)
    mark_lost(client, datetime.datetime.now(datetime.UTC) + PENDING_GRACE + MARGIN, WINDOW)
    assert read_type(client, run) == StateType.CRASHED


def test_a_run_whose_worker_was_lost_before_it_gave_its_name_is_marked_crashed(client: SyncPrefectClient) -> None:
    run = Pool(client).claim(None)
    now = datetime.datetime.now(datetime.UTC)
    mark_lost(client, now + CLAIM_GRACE - MARGIN, WINDOW)
    assert read_type(client, run) == StateType.PENDING
    mark_lost(client, now + CLAIM_GRACE + MARGIN, WINDOW)
    assert read_type(client, run) == StateType.CRASHED


@pytest.mark.parametrize("case", ["other tag", "no deployment", "completed"])
def test_other_runs_are_not_marked_crashed(client: SyncPrefectClient, case: str) -> None:
    run = make_run(client, tags=["other" if case == "other tag" else TAG], has_deployment=case != "no deployment")
    now = datetime.datetime.now(datetime.UTC)
    late = now + WINDOW + LOST_GRACE + MARGIN
    send_heartbeat(client, run, now)
    if case == "completed":
        client.set_flow_run_state(run, Completed(), force=True)
    before = read_type(client, run)
    mark_lost(client, late, WINDOW)
    assert read_type(client, run) == before


@pytest.mark.parametrize("state", [Completed(), Crashed(), State(type=StateType.CANCELLING)])
def test_a_state_that_changed_since_it_was_read_stays(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, state: State[Any]
) -> None:
    """A run ends, or a person cancels it, while the watchdog asks for the heartbeats of others."""
    run = make_run(client, tags=[TAG])
    now = datetime.datetime.now(datetime.UTC)
    send_heartbeat(client, run, now)
    stale = [client.read_flow_run(run)]
    client.set_flow_run_state(run, state, force=True)
    monkeypatch.setattr(client, "read_flow_runs", lambda **named: stale)
    assert mark_lost(client, now + WINDOW + LOST_GRACE + MARGIN, WINDOW) == 0
    assert read_type(client, run) == state.type


def test_a_run_that_is_gone_costs_only_itself(client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(client, tags=[TAG]) for _ in range(2)]
    now = datetime.datetime.now(datetime.UTC)
    for run in runs:
        send_heartbeat(client, run, now)
    stale = [client.read_flow_run(run) for run in runs]
    client.delete_flow_run(runs[0])
    monkeypatch.setattr(client, "read_flow_runs", lambda **named: stale)
    assert mark_lost(client, now + WINDOW + LOST_GRACE + MARGIN, WINDOW) == 1
    assert read_type(client, runs[1]) == StateType.CRASHED


def test_a_heartbeat_is_missed_only_where_it_could_have_arrived() -> None:
    now = datetime.datetime.now(datetime.UTC)
    watch = Watch(WINDOW)
    watch.note(now)
    assert not watch.has_waited(now + WINDOW - SECOND)
    watch.note(now + WINDOW - SECOND, slept=SLEPT_SECONDS)  # a busy machine
    assert watch.has_waited(now + WINDOW)
    watch.note(now + WINDOW, is_answering=False)  # the server was restarted
    watch.note(now + WINDOW + SECOND)
    assert not watch.has_waited(now + 2 * WINDOW)
    assert watch.has_waited(now + 2 * WINDOW + SECOND)
    watch.note(now + 3 * WINDOW, slept=SLEPT_SECONDS + 1)  # this machine was suspended
    watch.note(now + 3 * WINDOW)
    assert not watch.has_waited(now + 4 * WINDOW - SECOND)


def test_the_watchdog_outlives_a_server_that_is_away_and_one_that_answers_nonsense(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked: list[datetime.timedelta] = []
    monkeypatch.setattr(watchdog, "mark_lost", lambda client, now, window: marked.append(window))
    watch = Watch(datetime.timedelta(0))
    watchdog.look(client, watch)
    assert marked == [watch.window]
    since = watch.since
    for error in (
        httpx.ReadTimeout("late"),
        ObjectNotFound(Exception("gone")),
        KeyError("events"),
        ValueError("no JSON"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(watchdog, "reschedule", Mock(side_effect=error))
            watchdog.look(client, watch)
        assert watch.since == (None if isinstance(error, httpx.TransportError) else since)
        watch.since = since
    assert len(marked) == 1
