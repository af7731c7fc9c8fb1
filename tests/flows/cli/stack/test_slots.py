"""Slots of a host's concurrency limit: held by a training, waited for by the next, given back, and never in the way."""

import contextlib
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.cli.stack.registration import register_host
from flows.cli.stack.stack import LEASES
from tasks.diffusion import device
from tasks.diffusion.device import count_slots
from tasks.errors import LikenessError
from tasks.services.store.lease import read_boot
from tasks.stage import states
from tasks.stage.states import host_slots
from tests.support.cli_sandbox import serve_prefect


@pytest.fixture(autouse=True)
def name(client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A limit of two, of this test alone, on a server that this process talks to."""
    name = f"likeness-{uuid.uuid4().hex}"  # Prefect keeps a client for each name
    monkeypatch.setenv(states.HOST_LIMIT, name)
    monkeypatch.delenv(states.EMBEDDED, raising=False)
    monkeypatch.setattr(states, "SLOT_POLL_SECONDS", 0.1)
    register_host(client, max_runs=2)
    with temporary_settings({PREFECT_API_URL: str(client.api_url)}):
        yield name


def count_held(client: SyncPrefectClient, name: str) -> int:
    return client.read_global_concurrency_limit_by_name(name).active_slots


def never(what: str) -> None:
    raise AssertionError(what)


def test_a_training_holds_its_slots_and_gives_them_back(client: SyncPrefectClient, name: str) -> None:
    with host_slots(2, on_wait=never):
        assert count_held(client, name) == 2
    assert count_held(client, name) == 0
    with pytest.raises(ZeroDivisionError), host_slots(1, on_wait=never):
        1 / 0  # noqa: B018
    assert count_held(client, name) == 0


def test_the_next_training_says_what_it_waits_for_and_may_give_up(client: SyncPrefectClient, name: str) -> None:
    waited: list[str] = []

    def give_up(what: str) -> None:
        waited.append(what)
        raise LikenessError("the run is stopping")

    with host_slots(2, on_wait=never):
        with pytest.raises(LikenessError, match="stopping"), host_slots(1, on_wait=give_up):
            never("it got a slot")
        assert count_held(client, name) == 2
    assert waited == [f"a slot of {name}"]


@contextlib.contextmanager
def wait_behind(num: int) -> Iterator[list[str]]:
    """Hold a slot after waiting for one of `num` held by another training; yield what was waited for."""
    first = contextlib.ExitStack()
    first.enter_context(host_slots(num, on_wait=never))
    waited: list[str] = []

    def give_back(what: str) -> None:
        waited.append(what)
        first.close()

    with host_slots(1, on_wait=give_back):
        yield waited


def test_a_waiting_training_continues_when_a_slot_is_given_back(client: SyncPrefectClient, name: str) -> None:
    with wait_behind(2) as waited:
        assert count_held(client, name) == 1
    assert waited


@pytest.fixture
def bare_worker(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A run of a worker that nobody has given a limit; the name that it gives one, which the server has not yet."""
    host = f"host-{uuid.uuid4().hex}"
    monkeypatch.delenv(states.HOST_LIMIT)
    monkeypatch.setenv(states.WORKER_RUN, str(uuid.uuid4()))
    monkeypatch.setattr(states.socket, "gethostname", lambda: host)
    monkeypatch.setattr(states, "CONTAINER_MARKS", (tmp_path / "none",))
    monkeypatch.setattr(states, "count_host_gpus", lambda: 0)
    return f"likeness-{host}"


@pytest.mark.parametrize(("gpus", "taken", "limit"), [(0, 1, 1), (1, 1, 1), (4, 2, 4)])
def test_a_run_of_any_worker_creates_the_limit_of_its_host(
    client: SyncPrefectClient, bare_worker: str, monkeypatch: pytest.MonkeyPatch, gpus: int, taken: int, limit: int
) -> None:
    monkeypatch.setattr(states, "count_host_gpus", lambda: gpus)
    with host_slots(taken, on_wait=never):
        assert client.read_global_concurrency_limit_by_name(bare_worker).limit == limit
        assert count_held(client, bare_worker) == taken
    assert count_held(client, bare_worker) == 0


@pytest.mark.usefixtures("client")
def test_two_runs_of_a_host_without_gpu_train_one_after_the_other(bare_worker: str) -> None:
    with wait_behind(1) as waited:
        assert waited == [f"a slot of {bare_worker}"]


def test_a_limit_that_an_operator_has_set_stays_and_is_never_waited_for_in_vain(
    client: SyncPrefectClient, bare_worker: str
) -> None:
    client.upsert_global_concurrency_limit_by_name(bare_worker, 3)
    with host_slots(8, on_wait=never):  # Prefect would grant eight of three never
        assert count_held(client, bare_worker) == 3
    assert client.read_global_concurrency_limit_by_name(bare_worker).limit == 3


def test_containers_of_a_host_share_its_limit(
    bare_worker: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mark").touch()
    monkeypatch.setattr(states, "CONTAINER_MARKS", (tmp_path / "none", tmp_path / "mark"))
    names = set()
    for container in ("0a1b2c3d4e5f", "f5e4d3c2b1a0"):
        monkeypatch.setattr(states.socket, "gethostname", lambda name=container: name)
        names.add(states.name_limit())
    assert names == {f"likeness-{read_boot()[:8]}"}


@pytest.mark.parametrize("case", ["a terminal", "an empty name"])
def test_without_a_worker_or_with_an_empty_name_there_is_no_limit(
    client: SyncPrefectClient, bare_worker: str, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    if case == "a terminal":
        monkeypatch.delenv(states.WORKER_RUN)
    else:
        monkeypatch.setenv(states.HOST_LIMIT, "")
    with host_slots(1, on_wait=never):
        assert bare_worker not in {limit.name for limit in client.read_global_concurrency_limits(limit=200)}


def test_a_slot_is_held_and_given_back_across_a_restart_of_the_server(
    tmp_path: Path, free_port: int, name: str
) -> None:
    stored = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES}
    held = contextlib.ExitStack()

    def give_up(what: str) -> None:
        raise LikenessError(what)

    with serve_prefect(tmp_path, port=free_port, variables=stored) as url, temporary_settings({PREFECT_API_URL: url}):
        with SyncPrefectClient(url) as client:
            client.upsert_global_concurrency_limit_by_name(name, 1)
        held.enter_context(host_slots(1, on_wait=never))
    with serve_prefect(tmp_path, port=free_port, variables=stored) as url, temporary_settings({PREFECT_API_URL: url}):
        with pytest.raises(LikenessError, match="a slot of likeness-"), host_slots(1, on_wait=give_up):
            never("it got the slot that is held")
        held.close()
        with SyncPrefectClient(url) as client:
            assert count_held(client, name) == 0
        with host_slots(1, on_wait=never):
            pass


@pytest.mark.parametrize("case", ["away", "silent", "no limit", "no stack", "own server", "no device"])
def test_whatever_grants_no_slot_stops_no_training(free_port: int, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(states, "SLOT_TIMEOUT_SECONDS", 2.0)
    monkeypatch.setattr(states, "RELEASE_SECONDS", 1.0)
    changes = {"no limit": (states.HOST_LIMIT, "likeness-of-nobody"), "no stack": (states.HOST_LIMIT, ""),
               "own server": (states.EMBEDDED, "1")}  # fmt: skip
    if case in changes:
        monkeypatch.setenv(*changes[case])
    done = []
    with socket.socket() as silent:
        if case == "silent":  # it accepts connections and never answers
            silent.bind(("127.0.0.1", free_port))
            silent.listen()
        gone = {PREFECT_API_URL: f"http://127.0.0.1:{free_port}/api"} if case in ("away", "silent") else {}
        with temporary_settings(gone), host_slots(0 if case == "no device" else 1, on_wait=never):
            done.append(case)
    assert done == [case]


def test_the_limit_follows_what_up_is_told(client: SyncPrefectClient, name: str) -> None:
    register_host(client, max_runs=5)
    assert client.read_global_concurrency_limit_by_name(name).limit == 5


def test_a_training_takes_a_slot_for_each_whole_gpu_and_one_where_the_host_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "DRIVER", tmp_path / "none")
    assert count_slots([]) == 1
    monkeypatch.setattr(device, "DRIVER", tmp_path)
    assert [count_slots(names) for names in ([], ["0"], ["0", "1"], ["MIG-1"])] == [0, 1, 2, 0]
