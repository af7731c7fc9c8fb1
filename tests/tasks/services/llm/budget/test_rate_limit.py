"""Requests and tokens a minute, on a clock of the test's own."""

from tasks.services.llm.budget.rate_limit import RateLimiter


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def begin(num: int, tokens: int, *, requests: int | None = None, per_minute: int | None = None) -> list[float]:
    """Return when each of several calls began."""
    clock = Clock()
    pace = RateLimiter(requests, per_minute, clock=clock.read, sleep=clock.sleep)
    times = []
    for _ in range(num):
        pace.wait(tokens)
        times.append(clock.now)
        clock.now += 1.0
    return times


def test_requests_in_any_minute_stay_within_the_limit() -> None:
    assert begin(5, 10, requests=2) == [0.0, 1.0, 60.0, 61.0, 120.0]


def test_tokens_in_any_minute_stay_within_the_limit() -> None:
    assert begin(4, 400, per_minute=1000) == [0.0, 1.0, 60.0, 61.0]


def test_a_request_over_the_token_limit_is_sent_alone() -> None:
    assert begin(2, 5000, per_minute=1000) == [0.0, 60.0]


def test_without_limits_no_request_waits() -> None:
    assert begin(3, 10**6) == [0.0, 1.0, 2.0]
