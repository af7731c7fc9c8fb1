"""Deduplicate concurrent identical work, in this process and among all processes that share a store."""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import PurePosixPath
from typing import Any, TypeVar

from tasks.errors import LikenessError
from tasks.services.llm.retries import current_signal
from tasks.services.store.base import Store
from tasks.services.store.lease import LEASES, make_lease, read_lease
from tasks.stage.digests import dump_signed

T = TypeVar("T")
POLL_SECONDS = 0.5
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

    A holder that is gone is noticed at once on its own host. Whoever has waited for `max_wait_seconds` works without
    being the only one: twice is better than never.

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
    deadline = time.monotonic() + max_wait_seconds
    while not store.put_if_absent(claim_key, claim) and time.monotonic() < deadline:
        if (found := find()) is not None:
            return found
        holder = read_lease(store, claim_key)
        if holder is not None and holder.has_ended():
            store.delete(claim_key)
        elif holder is not None:
            current_signal().check()
            time.sleep(POLL_SECONDS)
    try:
        found = find()  # stored between the caller's last look and the claim
        return work() if found is None else found
    finally:
        try:
            store.delete(claim_key)
        except LikenessError as error:  # the result counts; whoever asks again finds it, or waits once
            log.warning("a claim was not given back: %s", error)
