"""Leases in the store: one holder per name, considered dead when its process or its heartbeat is gone.

A stale lease is taken over by creating the next number with a conditional put, which succeeds for one contender only.
The clocks of two hosts may differ by more than a lease lives, and may be set while it is held. So a contender watches a
lease by its own monotonic clock: one that is renewed is never taken over.
"""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import psutil
from pydantic import BaseModel

from tasks.errors import ArtifactCorrupt, LeaseLost, LikenessError, StillPending
from tasks.services.store.base import Store
from tasks.stage.digests import dump_signed, load_signed

log = logging.getLogger(__name__)
CLOCK_SLACK_SECONDS = 2.0
LEASES = "leases"
TRUSTED_SECONDS = 60.0  # after a renewal; well below the expiry, since a write takes time too
HEARTBEAT_SECONDS, EXPIRY_SECONDS = 20.0, 120.0  # five heartbeats may fail


class Lease(BaseModel):
    """Who holds a name, and until when."""

    owner: str
    host: str
    pid: int
    process_started: float
    boot: str = ""
    """Of its host when the process started."""
    expires_at: float
    """By the holder's clock."""

    def has_ended(self) -> bool:
        """Whether its holder is gone for certain: no such process on this host, or the lease is damaged."""
        is_here = self.host == socket.gethostname()
        return not self.owner or (is_here and not is_same_process(self.pid, self.process_started, self.boot))

    def is_stale(self) -> bool:
        """Whether its holder seems gone, as far as one look and this host's clock can say; a `Contender` looks on."""
        return self.has_ended() or time.time() > self.expires_at


@lru_cache(maxsize=1)
def read_boot() -> str:
    """Return what tells this start of the machine from others; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def find_start(pid: int) -> float:
    """Return when a process started, in seconds since its machine did; 0 where there is none.

    With the pid and `read_boot` it tells a process from another one that got its pid. Steps of the clock do not change
    it.
    """
    try:
        process = psutil.Process(pid)
        # A zombie keeps its pid and start time, but no longer does any work.
        if process.status() == psutil.STATUS_ZOMBIE:
            return 0.0
        # On Linux psutil adds the boot time, which follows the clock.
        return float(process.create_time() - (psutil.boot_time() if psutil.LINUX else 0.0))
    except psutil.Error:
        return 0.0


def is_same_process(pid: int, started: float, boot: str) -> bool:
    """Whether the process that had a pid and a start (`find_start`) in a start of this machine is alive."""
    # Not exactly equal: the kernel's boot time is in whole seconds, and may change between two reads.
    found = find_start(pid)
    return boot == read_boot() and found > 0 and abs(found - started) <= CLOCK_SLACK_SECONDS


class HeldLease:
    """A lease of this process, renewed in the background, as a fence around writes.

    A process that was suspended for longer than a lease lives may find that another one works in its place. It must
    not write any more: `check` refuses, without a request while the last renewal is recent.
    """

    def __init__(self, store: Store, key: str, *, owner: str) -> None:
        self.store = store
        self.key = key
        self.owner = owner
        self.ended = threading.Event()
        self.confirmed_at = read_clock()
        self.thread = threading.Thread(target=self.keep_alive, daemon=True)
        self.thread.start()

    def check(self, *, is_final: bool = False) -> None:
        """Raise LeaseLost where another process may have taken the lease over.

        `is_final` asks the store even if the last renewal is recent: for the write that makes work visible.
        """
        if not is_final and read_clock() - self.confirmed_at < TRUSTED_SECONDS:
            return
        now = read_clock()  # before the request: the lease is known to be ours at the time that it is sent
        if not is_own(self.store, self.key, self.owner):
            raise LeaseLost(f"another process took over {describe_name(self.key)}; this one stops without writing")
        self.confirmed_at = now

    def keep_alive(self) -> None:
        """Renew the lease until it is released, or another process took it over."""
        while not self.ended.wait(HEARTBEAT_SECONDS):
            try:
                now = read_clock()
                if not is_own(self.store, self.key, self.owner):
                    log.warning("the lease of %s was taken over by another process", describe_name(self.key))
                    return
                # Check and write are not atomic. A take-over in between has a higher number, which `is_own` then sees.
                self.store.put_bytes(self.key, dump_signed(make_lease(self.owner)))
                self.confirmed_at = now
            except (LikenessError, OSError) as error:  # the next heartbeat may succeed before the lease expires
                log.warning("the lease of %s was not renewed: %s", describe_name(self.key), error)

    def release(self) -> None:
        """Give the lease back, so that a waiting process need not wait for its expiry."""
        self.ended.set()
        self.thread.join()  # else a last heartbeat could write the lease again after it is deleted
        try:
            if is_own(self.store, self.key, self.owner):
                self.store.delete(self.key)
        except (LikenessError, OSError) as error:  # it expires by itself; the work done under it counts
            log.warning("the lease of %s was not released and expires by itself: %s", describe_name(self.key), error)


class Contender:
    """One that wants to hold a name, and watches those that do by its own clock."""

    def __init__(self, store: Store, name: str, owner: str) -> None:
        self.store = store
        self.name = name
        self.owner = owner
        self.seen: dict[str, tuple[Lease, float]] = {}
        """Each lease, and since when it has not changed."""
        self.renewed: set[str] = set()

    def try_acquire(self) -> str | None:
        """Return the key of the acquired lease, or None where another process holds the name."""
        holder = find_holder(self.store, self.name)
        if holder is not None and not self.is_stale(*holder):
            return None
        # The number follows from the lease found stale: if a faster contender took it over, this key exists already.
        key = f"{prefix_of(self.name)}{(read_number(holder[0]) if holder else 0) + 1:06d}.json"
        if not self.store.put_if_absent(key, dump_signed(make_lease(self.owner))):
            return None
        # The put excludes contenders for the same number only. One that listed other leases may hold another number.
        for other in list_leases(self.store, self.name):
            if other != key:
                found = read_lease(self.store, other)
                if found is not None and not self.is_stale(other, found):
                    self.store.delete(key)  # acquired concurrently: both back off and try again
                    return None
                self.store.delete(other)
        return key

    def is_stale(self, key: str, found: Lease) -> bool:
        """Whether a lease's holder is gone: it has ended, or was not renewed while this contender looked on."""
        # Not `read_clock`: while this host is suspended, a holder on it could renew nothing.
        now = time.monotonic()
        known, since = self.seen.get(key, (None, now))
        if known != found:
            since = now
            self.seen[key] = (found, now)
            if known is not None:
                self.renewed.add(key)
        return found.has_ended() or now - since >= EXPIRY_SECONDS

    def is_undecided(self, key: str, found: Lease) -> bool:
        """Whether a lease seems stale and no renewal was seen: looking on will tell."""
        return found.is_stale() and key not in self.renewed


@contextmanager
def hold_lease(
    store: Store, name: str, *, max_wait_seconds: float, poll_seconds: float, on_wait: Callable[[str], None]
) -> Iterator[HeldLease]:
    """Hold a lease while the block runs, after waiting for another holder to end.

    Args:
        store: where leases lie.
        name: a kind and a name, for example `batch-jobs/1f3a`.
        max_wait_seconds: how long to wait for a living holder; for one that seems gone, until that is certain.
        poll_seconds: seconds between two looks.
        on_wait: called before each look with who holds the lease.

    Raises:
        StillPending: the other holder still runs after `max_wait_seconds`.

    """
    deadline = time.monotonic() + max_wait_seconds
    contender = Contender(store, name, uuid.uuid4().hex)
    while (key := contender.try_acquire()) is None:
        holder = find_holder(store, name)
        who = f"process {holder[1].pid} on {holder[1].host}" if holder else "another process"
        if time.monotonic() > deadline and not (holder and contender.is_undecided(*holder)):
            what = describe_name(prefix_of(name))
            raise StillPending(f"{who} holds the lease of {what}; run again when it has ended, or `likeness pending`")
        on_wait(who)
        time.sleep(min(1.0, poll_seconds))
    held = HeldLease(store, key, owner=contender.owner)
    try:
        yield held
    finally:
        held.release()


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
    return parse_lease(data)


def parse_lease(data: bytes) -> Lease:
    """Return a lease; a damaged one is returned as expired."""
    try:
        return load_signed(Lease, data)
    except ArtifactCorrupt:
        return Lease(owner="", host="", pid=0, process_started=0.0, expires_at=0.0)


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
        boot=read_boot(),
        expires_at=time.time() + EXPIRY_SECONDS,
    )


def prefix_of(name: str) -> str:
    """Return the key prefix of a name's leases."""
    return f"{LEASES}/{name}/"


def describe_name(key: str) -> str:
    """Return what a lease is of, for messages: `leases/batch-jobs/1f3a/000001.json` -> `batch job 1f3a`."""
    kind, name = key.split("/")[1:3]
    return f"{kind.removesuffix('s').replace('-', ' ')} {name[:12]}"


def read_clock() -> float:
    """Return seconds that include suspend, unaffected by changes of the system time."""
    # CLOCK_MONOTONIC excludes suspend on Linux. macOS has no CLOCK_BOOTTIME; its monotonic clock includes suspend.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def list_leases(store: Store, name: str) -> list[str]:
    """Return the keys of a name's leases, oldest first."""
    return [key for key in store.list_keys(prefix_of(name)) if key.endswith(".json")]


def read_number(key: str) -> int:
    """Return a lease's number."""
    stem = key.rsplit("/", 1)[-1].removesuffix(".json")
    return int(stem) if stem.isdigit() else 0
