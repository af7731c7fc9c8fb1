"""Identical work asked for at once is done once."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class SingleFlight:
    """Runs work by key; who asks for a key that is being worked on gets that outcome, errors included."""

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
        except BaseException as error:
            with self.lock:
                del self.flights[key]
            flight.set_exception(error)
            raise
        with self.lock:
            del self.flights[key]
        flight.set_result(result)
        return result, True
