"""A rank without heartbeats is found, whatever the clock is set to and though all processes were stopped meanwhile."""

import os
import time
from pathlib import Path

import pytest

from tasks.training.process.supervisor import Heartbeats
from tasks.training.process.worker_spec import RunFolder

LIMIT = 60.0


class Clock:
    """The supervisor's monotonic clock, and the ranks' files."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = RunFolder(folder)
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.pass_time)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def beat(self, *ranks: int, at: float) -> None:
        """Write heartbeats as of a time of the wall clock."""
        for rank in ranks:
            self.run.heartbeat(rank).touch()
            os.utime(self.run.heartbeat(rank), (at, at))

    def look(self, heartbeats: Heartbeats, seconds: float) -> list[int | None]:
        """Look every second, and return what was found each time."""
        found = []
        for _ in range(round(seconds)):
            heartbeats.sleep(1)
            found.append(heartbeats.find_stalled(LIMIT))
        return found


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(tmp_path, monkeypatch)


@pytest.mark.parametrize("step", [-3600.0, 0.0, 3600.0])
def test_a_rank_is_stalled_after_the_limit_whatever_the_wall_clock_says(clock: Clock, step: float) -> None:
    heartbeats = Heartbeats(clock.run, 2)
    clock.beat(0, 1, at=time.time())
    assert set(clock.look(heartbeats, LIMIT / 2)) == {None}
    clock.beat(0, 1, at=time.time() + step + 1)
    assert set(clock.look(heartbeats, LIMIT / 2)) == {None}
    clock.beat(0, at=time.time() + step + 2)
    found = clock.look(heartbeats, LIMIT)
    assert (found[: round(LIMIT / 2)], found[-1]) == ([None] * round(LIMIT / 2), 1)


def test_a_rank_that_never_begins_is_stalled_and_an_earlier_attempts_file_is_no_heartbeat(clock: Clock) -> None:
    clock.beat(0, at=time.time() + 900)
    heartbeats = Heartbeats(clock.run, 1)
    assert clock.look(heartbeats, LIMIT + 1) == [None] * round(LIMIT) + [0]


def test_time_in_which_the_supervisor_was_stopped_does_not_count(clock: Clock) -> None:
    heartbeats = Heartbeats(clock.run, 1)
    clock.beat(0, at=time.time())
    clock.look(heartbeats, LIMIT / 2)
    heartbeats.sleep(100 * LIMIT)  # stopped with all ranks, and continued
    assert clock.look(heartbeats, LIMIT / 2 - 1) == [None] * round(LIMIT / 2 - 1)
    assert clock.look(heartbeats, 5)[-1] == 0


def test_slow_looks_do_not_hide_a_stalled_rank(clock: Clock) -> None:
    heartbeats = Heartbeats(clock.run, 1)
    for _ in range(4):
        clock.pass_time(LIMIT / 3)  # a tracking server that hardly answers
        heartbeats.sleep(1)
    assert heartbeats.find_stalled(LIMIT) == 0
