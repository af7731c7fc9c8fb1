"""Leases in the store: one holder per name, considered dead when its process or its heartbeat is gone.

A stale lease is taken over by creating the next number with a conditional put, which succeeds for one contender only.
"""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
from pydantic import BaseModel

from tasks.errors import ArtifactCorrupt, LikenessError, StillPending
from tasks.services.store.base import Store
from tasks.stage.digests import dump_signed, load_signed

log = logging.getLogger(__name__)
CLOCK_SLACK_SECONDS = 2.0
HEARTBEAT_SECONDS, EXPIRY_SECONDS = 20.0, 120.0  # five heartbeats may fail; also absorbs clock skew between hosts


class Lease(BaseModel):
    """Who holds a name, and until when."""

    owner: str
    host: str
    pid: int
    process_started: float
    expires_at: float

    def is_stale(self) -> bool:
        """Whether its holder is gone: no heartbeat in time, or, on this host, no such process."""
        if time.time() > self.expires_at:
            return True
        # Not exactly equal: psutil adds the boot time, which shifts when the clock is adjusted.
        is_here = self.host == socket.gethostname()
        return is_here and abs(find_start(self.pid) - self.process_started) > CLOCK_SLACK_SECONDS


def find_start(pid: int) -> float:
    """Return a process's start time, 0 where there is none; with the pid it survives pid reuse."""
    try:
        process = psutil.Process(pid)
        # A zombie keeps its pid and start time, but no longer does any work.
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return 0.0


@contextmanager
def hold_lease(
    store: Store, name: str, *, max_wait_seconds: float, poll_seconds: float, on_wait: Callable[[], None]
) -> Iterator[None]:
    """Hold a lease while the block runs, after waiting for another holder to end.

    Raises:
        StillPending: the other holder still runs after `max_wait_seconds`.

    """
    deadline = time.monotonic() + max_wait_seconds
    owner = uuid.uuid4().hex
    while (key := try_acquire(store, name, owner)) is None:
        if time.monotonic() > deadline:
            holder = find_holder(store, name)
            who = f"process {holder[1].pid} on {holder[1].host}" if holder else "another process"
            raise StillPending(f"{who} runs the same batch job; `likeness pending` resumes this run when it has ended")
        on_wait()
        time.sleep(min(1.0, poll_seconds))
    ended = threading.Event()
    beat = threading.Thread(target=keep_alive, args=(store, key), kwargs={"owner": owner, "ended": ended}, daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()  # else a last heartbeat could write the lease again after it is deleted
        if is_own(store, key, owner):
            store.delete(key)


def try_acquire(store: Store, name: str, owner: str) -> str | None:
    """Return the key of the acquired lease, or None where another process holds the name."""
    holder = find_holder(store, name)
    if holder is not None and not holder[1].is_stale():
        return None
    # The number follows from the lease found stale: if a faster contender took it over, this key exists already.
    key = f"{prefix_of(name)}{(read_number(holder[0]) if holder else 0) + 1:06d}.json"
    if not store.put_if_absent(key, dump_signed(make_lease(owner))):
        return None
    # The put excludes contenders for the same number only. One that listed other leases may hold another number.
    for other in list_leases(store, name):
        if other != key:
            found = read_lease(store, other)
            if found is not None and not found.is_stale():  # acquired concurrently: both back off and try again
                store.delete(key)
                return None
            store.delete(other)
    return key


def find_holder(store: Store, name: str) -> tuple[str, Lease] | None:
    """Return the newest lease of a name and its key."""
    for key in reversed(list_leases(store, name)):
        found = read_lease(store, key)
        if found is not None:
            return key, found
    return None


def read_lease(store: Store, key: str) -> Lease | None:
    """Return a lease; a damaged one is returned as expired."""
    data = store.find_bytes(key)
    if data is None:
        return None
    try:
        return load_signed(Lease, data)
    except ArtifactCorrupt:
        return Lease(owner="", host="", pid=0, process_started=0.0, expires_at=0.0)


def keep_alive(store: Store, key: str, *, owner: str, ended: threading.Event) -> None:
    """Renew a lease until its holder ends, or another process took it over, for example after a suspend."""
    while not ended.wait(HEARTBEAT_SECONDS):
        try:
            if not is_own(store, key, owner):
                log.warning("lease %s was taken over by another process, which now runs the same job", key)
                return
            # Check and write are not atomic. A take-over in between has a higher number, which `is_own` then sees.
            store.put_bytes(key, dump_signed(make_lease(owner)))
        except (LikenessError, OSError) as error:  # the next heartbeat may succeed before the lease expires
            log.warning("lease %s was not renewed: %s", key, error)


def is_own(store: Store, key: str, owner: str) -> bool:
    """Whether a lease is still its owner's: present, with its token, and the newest of its name."""
    # The token decides, not the key: numbers start again at 1 once all leases of a name are deleted.
    found = read_lease(store, key)
    if found is None or found.owner != owner:
        return False
    listed = store.list_keys(key.rpartition("/")[0] + "/")
    return not any(other > key for other in listed if other.endswith(".json"))


def make_lease(owner: str) -> Lease:
    """Return a lease of this process."""
    return Lease(
        owner=owner,
        host=socket.gethostname(),
        pid=os.getpid(),
        process_started=find_start(os.getpid()),
        expires_at=time.time() + EXPIRY_SECONDS,
    )


def prefix_of(name: str) -> str:
    """Return the key prefix of a name's leases."""
    return f"llm/leases/{name}/"


def list_leases(store: Store, name: str) -> list[str]:
    """Return the keys of a name's leases, oldest first."""
    return [key for key in store.list_keys(prefix_of(name)) if key.endswith(".json")]


def read_number(key: str) -> int:
    """Return a lease's number."""
    stem = key.rsplit("/", 1)[-1].removesuffix(".json")
    return int(stem) if stem.isdigit() else 0
