"""Deduplicate concurrent identical work."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


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
