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
from tasks.diffusion import device
from tasks.diffusion.device import count_slots
from tasks.errors import LikenessError
from tasks.stage import states
from tasks.stage.states import host_slots


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


def test_a_waiting_training_goes_on_when_a_slot_is_given_back(client: SyncPrefectClient, name: str) -> None:
    first = contextlib.ExitStack()
    first.enter_context(host_slots(2, on_wait=never))
    waited: list[str] = []

    def give_back(what: str) -> None:
        waited.append(what)
        first.close()

    with host_slots(1, on_wait=give_back):
        assert count_held(client, name) == 1
    assert waited


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
