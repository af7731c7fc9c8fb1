"""The watchdog schedules crashed runs again that the automation has missed, and leaves all others alone."""

import datetime
import uuid

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.states import Completed, Crashed

from flows.cli.stack.registration import TAG
from flows.cli.stack.watchdog import GRACE, MAX_AGE, reschedule
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
