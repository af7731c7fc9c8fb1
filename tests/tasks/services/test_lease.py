"""Leases: one holder at a time; a dead holder, a silent one and a damaged record are taken over by one."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.errors import StillPending
from tasks.services.store import lease
from tasks.services.store.lease import Contender, HeldLease, Lease, hold_lease, list_leases, make_lease
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
    assert Contender(leases, "batch-jobs/job", "me").try_acquire() is None
    child.kill()
    child.wait()
    assert Contender(leases, "batch-jobs/job", "me").try_acquire() is not None


def test_a_reused_pid_does_not_hold_the_lease(leases: LocalStore) -> None:
    mine = make_lease("other")
    put(leases, mine.model_copy(update={"process_started": mine.process_started - 100}))
    assert Contender(leases, "batch-jobs/job", "me").try_acquire() is not None


def make_foreign(expires_in: float) -> Lease:
    """Return a lease of another host, whose clock may be wrong."""
    changes = {"host": "elsewhere", "pid": 1, "expires_at": time.time() + expires_in}
    return make_lease("other").model_copy(update=changes)


CLOCKS = pytest.mark.parametrize("skew", [-600.0, 600.0], ids=["behind", "ahead"])


@CLOCKS
def test_a_lease_of_another_host_is_taken_over_if_it_is_not_renewed_whatever_its_clock(
    leases: LocalStore, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.5)
    put(leases, make_foreign(skew))
    assert Contender(leases, "batch-jobs/job", "me").try_acquire() is None
    with hold(leases, max_wait_seconds=60):
        pass


@CLOCKS
def test_a_lease_of_another_host_is_not_taken_over_while_it_is_renewed_whatever_its_clock(
    leases: LocalStore, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    contender = Contender(leases, "batch-jobs/job", "me")
    for number in range(20):
        put(leases, make_foreign(skew + number))
        now = number * lease.HEARTBEAT_SECONDS
        assert contender.try_acquire() is None
    now += lease.EXPIRY_SECONDS - 1
    assert contender.try_acquire() is None
    now += 1
    assert contender.try_acquire() is not None


def test_a_caller_that_does_not_wait_still_finds_out_whether_a_holder_is_gone(
    leases: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.5)
    put(leases, make_foreign(-600))
    with hold(leases, max_wait_seconds=0.0):
        pass
    put(leases, make_foreign(60))
    with pytest.raises(StillPending), hold(leases, max_wait_seconds=0.0):
        pass


def test_a_process_of_an_earlier_start_of_the_machine_is_gone_whatever_has_its_pid(leases: LocalStore) -> None:
    mine = make_lease("other")
    assert not mine.has_ended()
    put(leases, mine.model_copy(update={"boot": "another"}))
    assert Contender(leases, "batch-jobs/job", "me").try_acquire() is not None


@pytest.mark.skipif(not psutil.LINUX, reason="psutil adds the boot time on Linux alone")
def test_a_step_of_the_clock_does_not_end_a_lease_of_this_host(
    leases: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(leases, make_lease("other"))
    booted = psutil.boot_time()
    for step in (-600.0, 600.0):
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda step=step: booted + step)
        assert Contender(leases, "batch-jobs/job", "me").try_acquire() is None


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: data.replace(b"job", b"jab") + b"x"])
def test_a_damaged_lease_is_taken_over(leases: LocalStore, damage: object) -> None:
    data = dump_signed(make_lease("other"))
    leases.put_bytes("leases/batch-jobs/job/000001.json", damage(data))  # type: ignore[operator]
    assert Contender(leases, "batch-jobs/job", "me").try_acquire() is not None


def test_exactly_one_of_many_concurrent_takeovers_succeeds(leases: LocalStore) -> None:
    put(leases, make_lease("other").model_copy(update={"boot": "another"}))
    got: list[str | None] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        got.append(Contender(leases, "batch-jobs/job", str(number)).try_acquire())

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
    key = Contender(leases, "batch-jobs/job", "sleeper").try_acquire()
    assert key is not None
    held = HeldLease(leases, key, owner="sleeper")
    put(leases, make_lease("sleeper").model_copy(update={"boot": "another"}))
    taken = Contender(leases, "batch-jobs/job", "taker").try_acquire()
    assert taken is not None
    held.thread.join(20)
    assert not held.thread.is_alive()
    held.release()
    assert list_leases(leases, "batch-jobs/job") == [taken]
    assert Contender(leases, "batch-jobs/job", "third").try_acquire() is None


def test_a_stale_holder_does_not_delete_the_lease_of_another(leases: LocalStore) -> None:
    with hold(leases):
        put(leases, make_lease("other"))
    assert list_leases(leases, "batch-jobs/job") == ["leases/batch-jobs/job/000001.json"]
