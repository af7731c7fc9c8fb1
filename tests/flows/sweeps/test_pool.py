"""Sweeps that hold a slot of the work pool that their trials need, on a real Prefect server whose pool is full."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Completed, Crashed, Pending, Running

from conf.request import RunRequest
from flows.sweeps.outcome import SweepOutcome
from flows.sweeps.pool import DEPLOYMENT, NO_POOL, SWEEP_FLOW, PoolRunner, choose_runner
from flows.sweeps.runners import LocalRunner, RunOrder
from tests.support.cli_sandbox import serve_prefect
from tests.support.sweep import RATE, FakeRuns, sweep, sweep_request

POOL = "likeness"
FLOW = DEPLOYMENT.partition("/")[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """A server with the deployment, and a worker that is online and takes no run."""
    with serve_prefect(tmp_path_factory.mktemp("prefect")) as url, SyncPrefectClient(url) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", concurrency_limit=1))
        flow = client.create_flow_from_name(FLOW)
        client.create_deployment(flow, name=FLOW, work_pool_name=POOL, enforce_parameter_schema=False)
        with temporary_settings({PREFECT_API_URL: url}):
            yield client


@pytest.fixture
def client(server: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> SyncPrefectClient:
    """The server with a pool of one slot that is free, for tests that wait for half a second."""
    monkeypatch.setattr("flows.sweeps.pool.START_SECONDS", 0.5)
    monkeypatch.setattr("flows.sweeps.trials.POLL_SECONDS", 0.1)
    monkeypatch.setattr("flows.sweep_settings.draw_plots", lambda study: [])
    for run in server.read_flow_runs():
        server.delete_flow_run(run.id)
    limit_pool(server, 1)
    beat(server)
    return server


def beat(client: SyncPrefectClient) -> None:
    """Send a worker's heartbeat."""
    body = {"name": "a worker", "heartbeat_interval_seconds": 600}
    client.request(
        "POST", "/work_pools/{work_pool_name}/workers/heartbeat", path_params={"work_pool_name": POOL}, json=body
    )


def limit_pool(client: SyncPrefectClient, limit: int | None) -> None:
    client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=limit))


def hold_slot(client: SyncPrefectClient, *, flow_name: str = SWEEP_FLOW) -> FlowRun:
    """Create a run on the pool that a worker has started."""
    flow = client.create_flow_from_name(flow_name)
    deployment = client.create_deployment(flow, name=flow_name, work_pool_name=POOL, enforce_parameter_schema=False)
    run = client.create_flow_run_from_deployment(deployment)
    set_states(client, run.id, Pending(), Running())
    return run


def set_states(client: SyncPrefectClient, run_id: uuid.UUID, *states: State[None]) -> None:
    for state in states:
        client.set_flow_run_state(run_id, state)


def list_sub_runs(client: SyncPrefectClient) -> list[FlowRun]:
    return [run for run in client.read_flow_runs() if "sweep" in run.tags]


def run_deployed(folder: Path, runs: FakeRuns, monkeypatch: pytest.MonkeyPatch) -> SweepOutcome:
    """Run a sweep of two trials at once, as the run of a deployment."""
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", str(uuid.uuid4()))
    return sweep(sweep_request(folder, f"{RATE}=1e-5,1e-4", num_parallel=2), runs)


def test_a_deployed_sweep_that_holds_the_only_slot_runs_its_trials_itself_and_says_so(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hold_slot(client)
    runs = FakeRuns()
    outcome = run_deployed(tmp_path, runs, monkeypatch)
    assert [trial.status for trial in outcome.trials] == ["complete", "complete"]
    assert len(runs.requests) == 2 and list_sub_runs(client) == []
    assert "sweeps hold all 1 slots of the pool likeness: trials run in this process, one at a time\n" in (
        capsys.readouterr().err
    )


def test_of_sweeps_that_would_hold_all_slots_the_last_one_runs_its_trials_itself(client: SyncPrefectClient) -> None:
    local = LocalRunner(FakeRuns())
    limit_pool(client, 2)
    hold_slot(client)
    assert isinstance(choose_runner(2, local, is_deployed=True), PoolRunner)
    hold_slot(client, flow_name="another-flow")  # ends by itself
    assert isinstance(choose_runner(2, local, is_deployed=True), PoolRunner)
    hold_slot(client)
    assert choose_runner(2, local, is_deployed=True) is local
    assert isinstance(choose_runner(2, local, is_deployed=False), PoolRunner), "it holds no slot"
    limit_pool(client, None)
    assert isinstance(choose_runner(2, local, is_deployed=True), PoolRunner)
    queue = client.read_work_queue_by_name("default", work_pool_name=POOL)
    client.update_work_queue(queue.id, concurrency_limit=1)
    assert choose_runner(2, local, is_deployed=True) is local, "a queue has a limit too"
    client.update_work_queue(queue.id, concurrency_limit=None)


def test_two_sweeps_whose_pool_is_limited_later_take_their_runs_back_from_it(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        limit_pool(client, 3)
        hold_slot(client)
        runs = FakeRuns()
        with monkeypatch.context() as patch:
            # After the sweep has chosen its pool.
            patch.setattr(PoolRunner, "start", lower_first(client, PoolRunner.start))
            outcome = run_deployed(tmp_path / str(number), runs, patch)
        assert [trial.status for trial in outcome.trials] == ["complete", "complete"]
        assert len(runs.requests) == 2
        assert capsys.readouterr().err.count("got no slot of its pool in 0.5 s: it runs in the sweep's process\n") == 2
    # No worker takes them any more.
    assert [run.state and run.state.is_cancelled() for run in list_sub_runs(client)] == [True] * 4


def lower_first(client: SyncPrefectClient, start: object) -> object:
    """Return `PoolRunner.start` behind an operator that lowers the pool's limit."""

    def lowered(runner: PoolRunner, order: RunOrder) -> object:
        limit_pool(client, 1)
        return start(runner, order)  # type: ignore[operator]

    return lowered


def test_a_run_that_waits_is_left_to_the_pool_while_another_one_of_the_sweep_is_at_work(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.sweeps.pool.START_SECONDS", 0.0)
    fallback = FakeRuns()
    runner = PoolRunner(2, fallback=LocalRunner(fallback))
    request = RunRequest(settings={"output_dir": str(tmp_path)})
    first, second = (runner.start(RunOrder(request, f"{uuid.uuid4()}")) for _ in range(2))
    [at_work] = [run for run in list_sub_runs(client) if run.name == first.order.name]  # type: ignore[attr-defined]
    set_states(client, at_work.id, Pending(), Running())
    for _ in range(3):
        assert (first.poll(), second.poll()) == (None, None)
    assert fallback.requests == []


@pytest.mark.parametrize("is_crashed", [False, True])
def test_what_passed_since_the_last_run_ended_is_no_wait_of_the_next(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_crashed: bool
) -> None:
    now = [1.0]
    monkeypatch.setattr("flows.sweeps.pool.time.monotonic", lambda: now[0])
    fallback = FakeRuns()
    runner = PoolRunner(1, fallback=LocalRunner(fallback))
    request = RunRequest(settings={"output_dir": str(tmp_path)})
    first = runner.start(RunOrder(request, f"{uuid.uuid4()}"))
    [sent] = list_sub_runs(client)
    set_states(client, sent.id, Pending(), Running())
    assert first.poll() is None
    set_states(client, sent.id, Crashed() if is_crashed else Completed())
    first.poll()
    now[0] += 1000.0  # plots, tracking, or the time that a crashed run has to be scheduled again
    assert first.poll() is not None
    assert runner.start(RunOrder(request, f"{uuid.uuid4()}")).poll() is None, "it waits for its own 60 s"
    assert fallback.requests == []


def test_a_run_of_an_interrupted_sweep_that_was_cancelled_with_it_is_sent_anew(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    order = RunOrder(RunRequest(settings={"output_dir": str(tmp_path)}), "a-name")
    PoolRunner(2).start(order).cancel()
    again = PoolRunner(2).start(order)
    assert again.poll() is None, "it is scheduled"
    assert len(list_sub_runs(client)) == 2
    PoolRunner(2).start(order)  # finds the one that waits
    assert len(list_sub_runs(client)) == 2
    [waiting] = [run for run in list_sub_runs(client) if run.state and run.state.is_scheduled()]
    set_states(client, waiting.id, Pending(), Running(), Cancelling())  # it saves its training
    PoolRunner(2).start(order)
    assert len(list_sub_runs(client)) == 3


def test_without_an_online_worker_trials_run_in_this_process(
    client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"work_pool_name": POOL, "name": "a worker"}
    client.request("DELETE", "/work_pools/{work_pool_name}/workers/{name}", path_params=place)
    local = LocalRunner(FakeRuns())
    assert choose_runner(2, local, is_deployed=True) is local
    assert NO_POOL in capsys.readouterr().err
    assert choose_runner(1, local, is_deployed=True) is local
    assert capsys.readouterr().err == ""
