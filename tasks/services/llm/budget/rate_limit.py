"""Client-side rate limiting, so that a provider's limits are respected instead of met as 429 responses."""

import threading
import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 60.0


class RateLimiter:
    """Sliding-window limiter of requests and input tokens per minute.

    It counts the calls of this process only; 429 responses to other processes' load are left to the retries.
    """

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.most_requests = requests_per_minute
        self.most_tokens = tokens_per_minute
        self.clock = clock
        self.sleep = sleep
        self.lock = threading.Lock()
        self.begun: deque[tuple[float, int]] = deque()

    def wait(self, tokens: int) -> None:
        """Block until a call of `tokens` input tokens may start.

        A call larger than the whole limit starts once the window is empty, since it would otherwise wait forever.
        """
        while True:
            with self.lock:
                pause = self._find_pause(tokens)
                if pause <= 0:
                    self.begun.append((self.clock(), tokens))
                    return
            # Outside the lock, then checked again: another thread may have taken the room meanwhile.
            self.sleep(pause)

    def _find_pause(self, tokens: int) -> float:
        now = self.clock()
        while self.begun and self.begun[0][0] <= now - WINDOW_SECONDS:
            self.begun.popleft()
        pause, requests, used = 0.0, len(self.begun), sum(count for _, count in self.begun)
        for at, count in self.begun:  # how many of the oldest have to leave the window first
            if self._has_room(requests, used + tokens):
                break
            pause, requests, used = at + WINDOW_SECONDS - now, requests - 1, used - count
        return pause

    def _has_room(self, requests: int, tokens: int) -> bool:
        is_few = self.most_requests is None or requests < self.most_requests
        return is_few and (self.most_tokens is None or tokens <= self.most_tokens)
