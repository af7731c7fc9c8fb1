"""Leases: one holder at a time; a dead holder, a silent one and a damaged record are taken over by one."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import StillPending
from tasks.services.store import lease
from tasks.services.store.lease import HeldLease, Lease, hold_lease, list_leases, make_lease, try_acquire
from tasks.services.store.local import LocalStore
from tasks.stage.digests import dump_signed


@pytest.fixture
def leases(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "leases")


def hold(store: LocalStore, *, max_wait_seconds: float = 0.2) -> Any:
    return hold_lease(
        store, "batch-jobs/job", max_wait_seconds=max_wait_seconds, poll_seconds=0.01, on_wait=lambda who: None
    )


def put(store: LocalStore, found: Lease) -> None:
    store.put_bytes("leases/batch-jobs/job/000001.json", dump_signed(found))


def test_a_second_holder_times_out_with_an_error_naming_the_first(leases: LocalStore) -> None:
    names_holder = pytest.raises(StillPending, match=r"process \d+ on .* holds the lease of batch job job")
    with hold(leases), names_holder, hold(leases):
        pass
    with hold(leases):
        pass
    assert list_leases(leases, "batch-jobs/job") == []


def test_the_lease_of_a_killed_process_is_taken_over_immediately(leases: LocalStore) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    mine = make_lease("other")
    put(leases, mine.model_copy(update={"pid": child.pid, "process_started": lease.find_start(child.pid)}))
    assert try_acquire(leases, "batch-jobs/job", "me") is None
    child.kill()
    child.wait()
    assert try_acquire(leases, "batch-jobs/job", "me") is not None


def test_a_reused_pid_does_not_hold_the_lease(leases: LocalStore) -> None:
    mine = make_lease("other")
    put(leases, mine.model_copy(update={"process_started": mine.process_started - 100}))
    assert try_acquire(leases, "batch-jobs/job", "me") is not None


def test_a_clock_adjustment_does_not_end_a_lease(leases: LocalStore) -> None:
    mine = make_lease("other")  # psutil derives start times from the boot time, which follows the clock
    put(leases, mine.model_copy(update={"process_started": mine.process_started + 0.5}))
    assert try_acquire(leases, "batch-jobs/job", "me") is None


@pytest.mark.parametrize(("age", "is_taken"), [(-60.0, False), (1.0, True)])
def test_a_lease_of_another_host_is_valid_until_its_heartbeat_expires(
    leases: LocalStore, age: float, is_taken: bool
) -> None:
    put(leases, make_lease("other").model_copy(update={"host": "elsewhere", "pid": 1, "expires_at": time.time() - age}))
    assert (try_acquire(leases, "batch-jobs/job", "me") is not None) is is_taken


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: data.replace(b"job", b"jab") + b"x"])
def test_a_damaged_lease_is_taken_over(leases: LocalStore, damage: object) -> None:
    data = dump_signed(make_lease("other"))
    leases.put_bytes("leases/batch-jobs/job/000001.json", damage(data))  # type: ignore[operator]
    assert try_acquire(leases, "batch-jobs/job", "me") is not None


def test_exactly_one_of_many_concurrent_takeovers_succeeds(leases: LocalStore) -> None:
    put(leases, make_lease("other").model_copy(update={"expires_at": 0.0}))
    got: list[str | None] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        got.append(try_acquire(leases, "batch-jobs/job", str(number)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(key is not None for key in got) == 1


def test_a_holder_renews_its_lease(leases: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.02)
    with hold(leases):
        [key] = list_leases(leases, "batch-jobs/job")
        first = leases.find_bytes(key)
        deadline = time.monotonic() + 20
        while leases.find_bytes(key) == first:
            assert time.monotonic() < deadline, "it was not renewed"
            time.sleep(0.01)


def test_a_lease_that_was_taken_over_is_neither_renewed_nor_released(
    leases: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.2)
    key = try_acquire(leases, "batch-jobs/job", "sleeper")
    assert key is not None
    held = HeldLease(leases, key, owner="sleeper")
    put(leases, make_lease("sleeper").model_copy(update={"expires_at": 0.0}))
    taken = try_acquire(leases, "batch-jobs/job", "taker")
    assert taken is not None
    held.thread.join(20)
    assert not held.thread.is_alive()
    held.release()
    assert list_leases(leases, "batch-jobs/job") == [taken]
    assert try_acquire(leases, "batch-jobs/job", "third") is None


def test_a_stale_holder_does_not_delete_the_lease_of_another(leases: LocalStore) -> None:
    with hold(leases):
        put(leases, make_lease("other"))
    assert list_leases(leases, "batch-jobs/job") == ["leases/batch-jobs/job/000001.json"]
