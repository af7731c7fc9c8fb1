"""Slots of a host's concurrency limit: held by a training, waited for by the next, given back, and never in the way."""

from collections.abc import Iterator

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.cli.stack.registration import register_host
from tasks.errors import LikenessError
from tasks.stage import states
from tasks.stage.states import host_slots

NAME = "likeness-a-host"


@pytest.fixture(autouse=True)
def limit(client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A limit of two on a server that this process talks to; nothing waits long."""
    monkeypatch.setenv(states.HOST_LIMIT, NAME)
    monkeypatch.setattr(states, "SLOT_POLL_SECONDS", 0.5)
    register_host(client, max_runs=2)
    with temporary_settings({PREFECT_API_URL: str(client.api_url)}):
        yield NAME


def count_held(client: SyncPrefectClient) -> int:
    return client.read_global_concurrency_limit_by_name(NAME).active_slots


def never(what: str) -> None:
    raise AssertionError(what)


def test_a_training_holds_its_slots_and_gives_them_back(client: SyncPrefectClient) -> None:
    with host_slots(2, on_wait=never):
        assert count_held(client) == 2
    assert count_held(client) == 0
    with pytest.raises(ZeroDivisionError), host_slots(1, on_wait=never):
        1 / 0  # noqa: B018
    assert count_held(client) == 0


def test_the_next_training_says_what_it_waits_for_and_may_give_up(client: SyncPrefectClient) -> None:
    waited: list[str] = []

    def give_up(what: str) -> None:
        waited.append(what)
        raise LikenessError("the run is stopping")

    with host_slots(2, on_wait=never):
        with pytest.raises(LikenessError, match="stopping"), host_slots(1, on_wait=give_up):
            never("it got a slot")
        assert count_held(client) == 2
    assert waited == [f"a slot of {NAME}"]


def test_a_waiting_training_goes_on_when_a_slot_is_given_back(client: SyncPrefectClient) -> None:
    first = host_slots(2, on_wait=never)
    first.__enter__()
    with host_slots(1, on_wait=lambda what: first.__exit__(None, None, None) and None):
        assert count_held(client) == 1


def test_a_server_that_is_away_and_a_host_without_a_limit_stop_no_training(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = {PREFECT_API_URL: f"http://127.0.0.1:{free_port}/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    done = []
    with temporary_settings(away), host_slots(1, on_wait=never):
        done.append("away")
    monkeypatch.setenv(states.HOST_LIMIT, "likeness-of-nobody")
    with host_slots(1, on_wait=never):
        done.append("no limit")
    monkeypatch.delenv(states.HOST_LIMIT)
    with host_slots(1, on_wait=never):
        done.append("no stack")
    assert done == ["away", "no limit", "no stack"]


def test_the_limit_follows_what_up_is_told(client: SyncPrefectClient) -> None:
    register_host(client, max_runs=5)
    assert client.read_global_concurrency_limit_by_name(NAME).limit == 5
