"""Deduplicate concurrent identical work, in this process and among all processes that share a store."""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import PurePosixPath
from typing import Any, TypeVar

from tasks.errors import LikenessError, ServiceUnavailable
from tasks.services.llm.retries import current_signal
from tasks.services.store.base import Store
from tasks.services.store.lease import LEASES, make_lease, parse_lease
from tasks.stage.digests import dump_signed

T = TypeVar("T")
POLL_SECONDS, MAX_POLL_SECONDS = 0.3, 3.0
log = logging.getLogger(__name__)


class SingleFlight:
    """Runs work by key; a caller whose key is in flight waits for that outcome, errors included."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.flights: dict[str, Future[Any]] = {}

    def run(self, key: str, work: Callable[[], T]) -> tuple[T, bool]:
        """Return the work's result, and whether it was done by this caller."""
        with self.lock:
            flight = self.flights.get(key)
            is_first = flight is None
            if flight is None:
                flight = self.flights[key] = Future()
        if not is_first:
            return flight.result(), False
        try:
            result = work()
        except BaseException as error:  # KeyboardInterrupt too, else waiters would block forever
            # Removed before waiters wake: one that tries again must not join the failed flight.
            with self.lock:
                del self.flights[key]
            flight.set_exception(error)
            raise
        with self.lock:
            del self.flights[key]
        flight.set_result(result)
        return result, True


def run_once(
    store: Store, key: str, work: Callable[[], T], *, find: Callable[[], T | None], max_wait_seconds: float
) -> T:
    """Return the result of work that is done by one process at a time; the others wait and find what it stored.

    A holder that is gone is noticed at once on its own host; elsewhere, and where it takes longer than
    `max_wait_seconds`, one of those that wait takes its place.

    Args:
        store: where results and claims lie.
        key: of the result.
        work: does it and stores the result.
        find: returns a stored result, None where there is none.
        max_wait_seconds: how long the work of another process may take.

    """
    claim_key = f"{LEASES}/replies/{PurePosixPath(key).name}"
    # Not a `HeldLease`: a claim is short and renewed by nobody, which saves a thread and four requests a call.
    claim = dump_signed(make_lease(uuid.uuid4().hex))
    seen, since, pause = b"", time.monotonic(), POLL_SECONDS
    while not put_claim(store, claim_key, claim):
        if (found := find()) is not None:
            return found
        held = store.find_bytes(claim_key)
        if held is None:
            continue
        if held != seen:
            seen, since, pause = held, time.monotonic(), POLL_SECONDS
        if parse_lease(held).has_ended() or time.monotonic() - since > max_wait_seconds:
            remove_claim(store, claim_key, held)
            continue
        current_signal().check()
        time.sleep(pause)
        pause = min(1.5 * pause, MAX_POLL_SECONDS)
    try:
        found = find()  # stored between the caller's last look and the claim
        return work() if found is None else found
    finally:
        try:
            remove_claim(store, claim_key, claim)
        except (LikenessError, OSError) as error:  # the result counts; whoever asks again finds it
            log.warning("a claim was not given back: %s", error)


def put_claim(store: Store, key: str, claim: bytes) -> bool:
    """Claim work; return False where another process has."""
    try:
        return store.put_if_absent(key, claim)
    except ServiceUnavailable as error:  # the work needs no claim; what it stores is tried by itself
        log.warning("no claim could be written: %s", error)
        return True


def remove_claim(store: Store, key: str, claim: bytes) -> None:
    """Remove a claim unless another one has taken its place."""
    if store.find_bytes(key) == claim:
        store.delete(key)
