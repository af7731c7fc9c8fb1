"""A tracking server that hangs: what returns late never touches what was published in the meantime."""

import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from tasks.manifests.training import LossRow
from tasks.publishing.registry import TrackedRun, track_run
from tasks.services.tracking import live as live_tracking
from tasks.services.tracking.base import MetricRow, NoTracker
from tasks.services.tracking.live import LiveRun


class HangingTracker(NoTracker):
    """Its start returns when it is released."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entered, self.released = threading.Event(), threading.Event()
        self.calls: list[str] = []

    def start(
        self, *, name: str, params: dict[str, str], tags: dict[str, str], started_ms: int | None = None
    ) -> str | None:
        self.entered.set()
        self.released.wait(60)
        self.calls.append("start")
        return self.name

    def forget(self, *, tag: str, value: str) -> list[str]:
        self.calls.append("forget")
        return []

    def log_metrics(self, rows: Iterable[MetricRow], *, at_ms: int | None = None) -> None:
        self.calls.append("log_metrics")

    def finish(self, *, is_failed: bool) -> None:
        self.calls.append(f"finish {is_failed}")


def begin(first: HangingTracker, second: HangingTracker) -> LiveRun:
    live = LiveRun(first, "run", {}, reopen=lambda: second)
    live.begin(tags={"t": "1"}, stale_tag="t", datasets=[])
    live.log_metrics([("train/loss", 0.5, 1)])
    assert first.entered.wait(60)
    return live


def end(live: LiveRun, first: HangingTracker) -> None:
    first.released.set()
    assert live.thread is not None
    live.thread.join(60)
    assert not live.thread.is_alive()


def test_a_start_that_returns_late_does_not_touch_the_published_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_tracking, "LONGEST_WAIT_SECONDS", 0.05)
    first, second = HangingTracker("late"), HangingTracker("published")
    second.released.set()
    live = begin(first, second)
    run_id, _ = track_run(
        first,
        TrackedRun(
            name="run",
            params={},
            publication_key="k",
            tags={},
            figures={},
            losses=[LossRow(step=1, loss=1.0)],
            folder=tmp_path,
            registered_model=None,
        ),
        live=live,
    )
    assert run_id == "published"
    assert second.calls == ["forget", "start", "log_metrics", "log_metrics", "finish False"]
    assert first.calls == []
    end(live, first)
    assert (live.run_id, live.is_open, live.logged) == (None, False, set())
    assert first.calls == ["start", "finish True"]


def test_abandoning_a_run_does_not_wait_for_a_hanging_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_tracking, "ABANDON_SECONDS", 0.05)
    first = HangingTracker("late")
    live = begin(first, first)
    live.abandon()
    assert first.calls == []
    end(live, first)
    assert (live.run_id, live.is_open) == (None, False)
    assert "log_metrics" not in first.calls
