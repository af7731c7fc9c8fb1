"""Retries of LLM calls, in this layer only, with a circuit breaker and a stop signal for all workers of a pool.

Worst cases, for one profile: a fatal answer to the first call costs one request, later one per worker;
status 5xx from the first call on costs `max_attempts` requests, later one more per other worker.
"""

import contextvars
import random
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from tasks.errors import LikenessError, ServiceUnavailable
from tasks.services.llm.chat.transport import translated
from tasks.services.llm.config import ProfileConfig
from tasks.services.llm.errors import EndpointUnavailable

MAX_BACKOFF_SECONDS = 60.0
A = TypeVar("A")
B = TypeVar("B")


class StopSignal:
    """Set by the first fatal error of a worker pool; no attempt starts after that."""

    def __init__(self, *, num_repairs: int = 1) -> None:
        self.event = threading.Event()
        self.error: BaseException | None = None
        self.num_repairs = num_repairs
        self.lock = threading.Lock()

    def take_repair(self) -> bool:
        """Take one repair of the pool's allowance; return whether there was one left."""
        with self.lock:
            self.num_repairs -= 1
            return self.num_repairs >= 0

    def set(self, error: BaseException) -> None:
        """Stop all workers, with the first error as the reason."""
        # The error before the event: a worker that wakes up has to find it.
        self.error = self.error or error
        self.event.set()

    def check(self) -> None:
        """Raise the error that stopped the workers, if one did."""
        if self.error is not None:
            raise self.error


signal_of_pool: contextvars.ContextVar[StopSignal | None] = contextvars.ContextVar("stop signal", default=None)


def current_signal() -> StopSignal:
    """Return the stop signal of this thread's pool; outside a pool a new one, which allows one repair."""
    return signal_of_pool.get() or StopSignal()


@contextmanager
def outside_of_pool() -> Iterator[None]:
    """Let calls fail without stopping the pool's other workers: for probes whose failure is a result."""
    token = signal_of_pool.set(None)
    try:
        yield
    finally:
        signal_of_pool.reset(token)


def map_in_pool(
    ask: Callable[[A], B], items: Iterable[A], *, concurrency: int, num_repairs: int = 0
) -> Generator[B, None, None]:
    """Yield results in order of items; the first error stops every worker: no further item, no further attempt."""
    signal = StopSignal(num_repairs=num_repairs)

    def work(item: A) -> B:
        signal.check()
        try:
            return ask(item)
        except BaseException as error:
            signal.set(error)
            raise

    # Set only while contexts are copied: a generator runs in its caller's context, where the value would leak across
    # yields. Pool threads inherit no context, and one context can't be entered twice at once: hence a copy per item.
    token = signal_of_pool.set(signal)
    try:
        contexts = [(contextvars.copy_context(), item) for item in items]
    finally:
        signal_of_pool.reset(token)
    with ThreadPoolExecutor(concurrency) as pool:
        futures: list[Future[B]] = [pool.submit(context.run, work, item) for context, item in contexts]
        try:
            for future in futures:
                yield future.result()
        except BaseException as error:  # GeneratorExit too, where the caller leaves early
            signal.set(error)
            for future in futures:
                future.cancel()
            if isinstance(error, Exception):
                signal.check()  # the first error, not the first in order
            raise


class CircuitBreaker:
    """A circuit breaker for one profile: while it is open, one caller probes and the others wait.

    It starts open, so the first call of a process goes alone: a wrong key costs one request, not one per worker.
    """

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.is_closed = False
        """Whether the last call succeeded."""
        self.prober: object | None = None

    def wait(self, caller: object, signal: StopSignal) -> float:
        """Block until the circuit is closed or this caller is the prober; return the seconds waited."""
        started = time.monotonic()
        with self.condition:
            while not self.is_closed and self.prober not in (None, caller):
                signal.check()
                self.condition.wait(0.05)  # polls, since a stop signal does not notify this condition
            signal.check()
            if not self.is_closed:
                self.prober = caller
        return time.monotonic() - started

    def report(self, caller: object, *, is_good: bool) -> None:
        """Close the circuit after a good answer, else open it; this caller probes then, unless another does."""
        with self.condition:
            self.is_closed = is_good
            if not is_good and self.prober is None:
                self.prober = caller
            self.condition.notify_all()

    def leave(self, caller: object) -> None:
        """Let another caller probe."""
        with self.condition:
            if self.prober is caller:
                self.prober = None
            self.condition.notify_all()


def call_with_retries(
    call: Callable[[float], A], profile: ProfileConfig, *, circuit: CircuitBreaker | None = None, max_attempts: int = 0
) -> A:
    """Call a provider until it answers, with exponential backoff, within the profile's total time.

    Args:
        call: makes one attempt; takes the remaining seconds.
        circuit: shared by all callers of the profile's chat completions; None: one for this call.
        max_attempts: 0: the profile's.

    Raises:
        LikenessError: the last attempt's error, or the first error of another worker of the pool.

    """
    signal, circuit, caller = current_signal(), circuit or CircuitBreaker(), object()
    attempts = max_attempts or profile.max_attempts
    deadline = time.monotonic() + profile.timeout_seconds
    try:
        for attempt in range(1, attempts + 1):
            deadline += circuit.wait(caller, signal)  # others' probes don't use up this call's time
            try:
                with translated(profile):
                    # The pause may have used up the rest, and an attempt needs a positive timeout.
                    result = call(max(0.1, deadline - time.monotonic()))
            except LikenessError as error:
                circuit.report(caller, is_good=False)
                pause = compute_backoff(error, attempt)
                is_last = attempt == attempts or time.monotonic() + pause > deadline
                if is_last or not isinstance(error, ServiceUnavailable) or not error.is_retryable:
                    signal.set(error)  # before `leave` lets another caller probe
                    raise
                signal.event.wait(pause)  # returns at once when the pool stops; the next circuit.wait raises
            else:
                circuit.report(caller, is_good=True)
                return result
    finally:
        circuit.leave(caller)
    raise AssertionError("unreachable")


def compute_backoff(error: LikenessError, attempt: int) -> float:
    """Return seconds to wait: the provider's Retry-After, else exponential backoff with jitter."""
    # Retry-After needs no bound: a pause beyond the call's deadline makes this attempt the last.
    if isinstance(error, EndpointUnavailable) and error.retry_after is not None:
        return error.retry_after
    return float(min(MAX_BACKOFF_SECONDS, 0.5 * 2**attempt) * random.uniform(0.5, 1.0))
