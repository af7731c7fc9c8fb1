"""The watchdog schedules crashed runs again that the automation has missed, and leaves all others alone."""

import datetime
import time
import uuid

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State, StateType
from prefect.states import Completed, Crashed

from flows.cli.stack.registration import TAG, make_automations
from flows.cli.stack.watchdog import GRACE, MAX_AGE, SLEPT_SECONDS, Watch, find_heartbeat, mark_lost, reschedule
from flows.runs.attempts import MAX_ATTEMPTS

LATE = GRACE + datetime.timedelta(seconds=5)


def make_run(client: SyncPrefectClient, *, tags: list[str], has_deployment: bool = True) -> uuid.UUID:
    flow = client._client.post("/flows/", json={"name": "personalize-subject"}).json()["id"]
    if not has_deployment:
        body = {"flow_id": flow, "tags": tags, "state": {"type": "RUNNING"}}
        return uuid.UUID(client._client.post("/flow_runs/", json=body).raise_for_status().json()["id"])
    deployment = client._client.post("/deployments/", json={"name": str(uuid.uuid4()), "flow_id": flow}).json()["id"]
    body = {"tags": tags, "state": {"type": "RUNNING"}}
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


WINDOW = datetime.timedelta(seconds=90)


def send_heartbeat(client: SyncPrefectClient, run: uuid.UUID, at: datetime.datetime) -> None:
    event = {
        "id": str(uuid.uuid4()),
        "occurred": at.isoformat(),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
    }
    client._client.post("/events", json=[event]).raise_for_status()
    for _ in range(100):  # events are stored in the background
        if find_heartbeat(client, run, since=at, until=at) == at:
            return
        time.sleep(0.1)
    raise AssertionError("the heartbeat was not stored")


def test_a_run_that_sends_no_heartbeat_any_more_is_marked_crashed(client: SyncPrefectClient) -> None:
    run = make_run(client, tags=[TAG])
    now = datetime.datetime.now(datetime.UTC)
    late = now + WINDOW + LATE
    assert mark_lost(client, late, WINDOW) == 0, "it never sent one: they may be switched off"
    send_heartbeat(client, run, now)
    assert mark_lost(client, now + WINDOW, WINDOW) == 0, "the automation has its time"
    assert read_type(client, run) == StateType.RUNNING
    assert mark_lost(client, late, WINDOW) == 1
    assert read_type(client, run) == StateType.CRASHED
    assert mark_lost(client, late, WINDOW) == 0


def test_a_cancelled_run_whose_process_is_gone_is_not_scheduled_again(client: SyncPrefectClient) -> None:
    run = make_run(client, tags=[TAG])
    now = datetime.datetime.now(datetime.UTC)
    send_heartbeat(client, run, now)
    client.set_flow_run_state(run, State(type=StateType.CANCELLING))
    late = now + WINDOW + LATE
    assert mark_lost(client, late, WINDOW) == 1
    assert read_type(client, run) == StateType.CANCELLED
    reschedule(client, late + LATE)
    assert read_type(client, run) == StateType.CANCELLED
    assert "prefect.flow-run.Cancelling" in make_automations()[0].trigger.expect  # it expects no heartbeat any more


@pytest.mark.parametrize("case", ["other tag", "no deployment", "completed", "alive"])
def test_other_runs_are_not_marked_crashed(client: SyncPrefectClient, case: str) -> None:
    run = make_run(client, tags=["other" if case == "other tag" else TAG], has_deployment=case != "no deployment")
    now = datetime.datetime.now(datetime.UTC)
    late = now + WINDOW + LATE
    send_heartbeat(client, run, late - WINDOW if case == "alive" else now)
    if case == "completed":
        client.set_flow_run_state(run, Completed(), force=True)
    before = read_type(client, run)
    mark_lost(client, late, WINDOW)
    assert read_type(client, run) == before


def test_heartbeats_that_could_not_arrive_are_not_missed() -> None:
    now = datetime.datetime.now(datetime.UTC)
    watch, step = Watch(WINDOW), datetime.timedelta(seconds=15)
    for _ in range(6):
        watch.note(now, is_answering=True)
        assert not watch.has_waited(now)
        now += step
    watch.note(now, is_answering=True)
    assert watch.has_waited(now)
    watch.note(now + step, is_answering=False)  # the server was restarted
    watch.note(now + 2 * step, is_answering=True)
    assert not watch.has_waited(now + 2 * step)
    watch.note(now + 8 * step, is_answering=True)  # this machine was suspended
    assert 6 * step.total_seconds() > SLEPT_SECONDS
    assert not watch.has_waited(now + 8 * step)
