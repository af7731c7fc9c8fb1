"""What a run measures of itself."""

import time
from typing import Any, cast

from tasks.stage.context import Runtime, StageRecord


def test_overhead_is_the_time_in_which_no_stage_ran() -> None:
    now = time.monotonic()
    runtime = cast(Any, Runtime.__new__(Runtime))
    runtime.spans = [
        # Two stages side by side count once: their seconds add up to more than the run took.
        StageRecord("k", started=now - 90, ended=now - 40),
        StageRecord("k", started=now - 88, ended=now - 60),
        StageRecord("k", started=now - 38, ended=now - 3),
    ]
    # 10 before, 2 between, 3 after; by the sum of the seconds it would be below zero.
    assert 15 <= runtime.measure_overhead(now - 100) < 60
    runtime.spans = [StageRecord("k", started=now - 100, ended=now + 100)]
    assert runtime.measure_overhead(now - 100) == 0
