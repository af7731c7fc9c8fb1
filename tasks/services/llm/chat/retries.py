"""The only layer that retries calls to LLM providers, and what stops all workers at once.

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

LONGEST_PAUSE_SECONDS = 60.0
A = TypeVar("A")
B = TypeVar("B")


class StopSignal:
    """Set by the first fatal error of a pool of workers; no attempt begins after that."""

    def __init__(self, *, num_repairs: int = 1) -> None:
        self.event = threading.Event()
        self.error: BaseException | None = None
        self.num_repairs = num_repairs
        self.lock = threading.Lock()

    def take_repair(self) -> bool:
        """Whether one more reply may be asked for again: their number is bounded for the pool as a whole."""
        with self.lock:
            self.num_repairs -= 1
            return self.num_repairs >= 0

    def set(self, error: BaseException) -> None:
        """Stop all workers, with the first error as the reason."""
        self.error = self.error or error
        self.event.set()

    def check(self) -> None:
        """Raise the error that stopped the workers, if one did."""
        if self.error is not None:
            raise self.error


signal_of_pool: contextvars.ContextVar[StopSignal | None] = contextvars.ContextVar("stop signal", default=None)


def current_signal() -> StopSignal:
    """Return the signal of the pool that this thread works in; one of its own elsewhere."""
    return signal_of_pool.get() or StopSignal()


@contextmanager
def outside_of_pool() -> Iterator[None]:
    """Let calls fail without stopping the pool's other workers: for trials whose failure is an answer."""
    token = signal_of_pool.set(None)
    try:
        yield
    finally:
        signal_of_pool.reset(token)


def map_in_pool(
    ask: Callable[[A], B], items: Iterable[A], *, concurrency: int, num_repairs: int = 0
) -> Generator[B, None, None]:
    """Yield results in order; the first error stops every worker: no further item, no further attempt."""
    signal = StopSignal(num_repairs=num_repairs)

    def work(item: A) -> B:
        signal.check()
        try:
            return ask(item)
        except BaseException as error:
            signal.set(error)
            raise

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


class Circuit:
    """A circuit breaker for one profile: after a failure one caller probes until it gets an answer; others wait.

    It starts open, so the very first call of a process goes alone.
    """

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.is_closed = False
        """Whether the last answer was good: calls flow."""
        self.prober: object | None = None

    def wait(self, caller: object, signal: StopSignal) -> float:
        """Return when this caller may send: calls flow, or it is the one who probes; return the seconds waited."""
        started = time.monotonic()
        with self.condition:
            while not self.is_closed and self.prober not in (None, caller):
                signal.check()
                self.condition.wait(0.05)
            signal.check()
            if not self.is_closed:
                self.prober = caller
        return time.monotonic() - started

    def report(self, caller: object, *, is_good: bool) -> None:
        """Note an answer; after a failure this caller probes, unless another does."""
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
    call: Callable[[float], A], profile: ProfileConfig, *, circuit: Circuit | None = None, max_attempts: int = 0
) -> A:
    """Call a provider until it answers, with growing pauses, within the profile's total time.

    Args:
        call: makes one attempt; takes the seconds that are left.
        circuit: shared by all callers of the profile's chat completions.
        max_attempts: instead of the profile's.

    """
    signal, circuit, caller = current_signal(), circuit or Circuit(), object()
    attempts = max_attempts or profile.max_attempts
    deadline = time.monotonic() + profile.timeout_seconds
    try:
        for attempt in range(1, attempts + 1):
            deadline += circuit.wait(caller, signal)  # others' probes don't use up this call's time
            try:
                with translated(profile):
                    result = call(max(0.1, deadline - time.monotonic()))
            except LikenessError as error:
                circuit.report(caller, is_good=False)
                pause = choose_pause(error, attempt)
                is_last = attempt == attempts or time.monotonic() + pause > deadline
                if is_last or not isinstance(error, ServiceUnavailable) or not error.is_retryable:
                    signal.set(error)  # before another caller may probe
                    raise
                signal.event.wait(pause)
            else:
                circuit.report(caller, is_good=True)
                return result
    finally:
        circuit.leave(caller)
    raise AssertionError("unreachable")


def choose_pause(error: LikenessError, attempt: int) -> float:
    """Return seconds to wait: what the provider asks for, else doubling with jitter."""
    if isinstance(error, EndpointUnavailable) and error.retry_after is not None:
        return error.retry_after
    return float(min(LONGEST_PAUSE_SECONDS, 0.5 * 2**attempt) * random.uniform(0.5, 1.0))
