"""What a scheduled run waits for, as a real Prefect server has it."""

import uuid
from collections.abc import Iterator

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Pending, Running

from flows.subjects.waiting import explain_wait
from tests.support.cli_sandbox import serve_prefect


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    with serve_prefect(tmp_path_factory.mktemp("prefect")) as url, SyncPrefectClient(url) as client:
        yield client


@pytest.fixture
def pool(client: SyncPrefectClient) -> str:
    """A pool of this test, without a worker and without a limit."""
    name = f"pool-{uuid.uuid4().hex[:8]}"
    client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    return name


def schedule(client: SyncPrefectClient, pool: str) -> FlowRun:
    """Create a run that the pool is to execute now."""
    flow = client.create_flow_from_name("a-flow")
    deployment = client.create_deployment(flow, name=pool, work_pool_name=pool, enforce_parameter_schema=False)
    run = client.create_flow_run_from_deployment(deployment)
    assert run.state is not None and run.state.is_scheduled()
    return client.read_flow_run(run.id)


def start_worker(client: SyncPrefectClient, pool: str) -> None:
    """Send the heartbeat of a worker."""
    body = {"name": "a worker", "heartbeat_interval_seconds": 600}
    place = {"work_pool_name": pool}
    client.request("POST", "/work_pools/{work_pool_name}/workers/heartbeat", path_params=place, json=body)


def test_a_run_whose_pool_has_no_worker_waits_for_one(client: SyncPrefectClient, pool: str) -> None:
    run = schedule(client, pool)
    assert explain_wait(client, run) == f"no worker of the pool {pool} is online; `likeness up` starts one"
    start_worker(client, pool)
    assert explain_wait(client, run) == "", "it is about to start"


@pytest.mark.parametrize("state", [Pending(), Running()], ids=["pending", "running"])
def test_a_run_waits_for_a_slot_while_others_hold_all_of_them(
    client: SyncPrefectClient, pool: str, state: Running
) -> None:
    start_worker(client, pool)
    first, second = schedule(client, pool), schedule(client, pool)
    client.set_flow_run_state(first.id, state, force=True)
    assert explain_wait(client, second) == "", "a pool without a limit"
    client.update_work_pool(pool, WorkPoolUpdate(concurrency_limit=1))
    assert explain_wait(client, second) == f"all 1 slots of the pool {pool} are in use"
    client.update_work_pool(pool, WorkPoolUpdate(concurrency_limit=2))
    assert explain_wait(client, second) == ""
    client.update_work_pool(pool, WorkPoolUpdate(concurrency_limit=1))
    client.set_flow_run_state(first.id, Completed(), force=True)
    assert explain_wait(client, second) == "", "the slot is free again"


def test_slots_of_another_pool_are_not_counted(client: SyncPrefectClient, pool: str) -> None:
    start_worker(client, pool)
    other = f"{pool}-other"
    client.create_work_pool(WorkPoolCreate(name=other, type="process", concurrency_limit=1))
    client.update_work_pool(pool, WorkPoolUpdate(concurrency_limit=1))
    client.set_flow_run_state(schedule(client, other).id, Running(), force=True)
    assert explain_wait(client, schedule(client, pool)) == ""


def test_a_run_of_a_deleted_pool_waits_in_vain_and_is_explained(client: SyncPrefectClient, pool: str) -> None:
    run = schedule(client, pool)
    client.delete_work_pool(pool)
    assert explain_wait(client, run) == f"the work pool {pool} is gone"


def test_a_run_without_a_pool_is_not_explained(client: SyncPrefectClient) -> None:
    flow = client.create_flow_from_name("a-flow")
    run = client.create_flow_run_from_deployment(client.create_deployment(flow, name="without a pool"))
    assert explain_wait(client, client.read_flow_run(run.id)) == ""
