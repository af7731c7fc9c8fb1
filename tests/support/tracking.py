"""Live tracking as a run does it, and what a server has of it."""

import time
from pathlib import Path
from typing import Any

from tasks.services.config import TrackingConfig
from tasks.services.tracking.live import LiveRun
from tasks.services.tracking.mlflow_tracker import MlflowTracker
from tasks.services.tracking.open import RunDescription, open_live

TAG = "likeness.training"


def begin(config: TrackingConfig, output: Path, name: str) -> LiveRun:
    tracker = MlflowTracker(config, folder=output)
    live = open_live(config, tracker, RunDescription(output / name, {"seed": "23"}, {"likeness.config": "c"}))
    live.begin(tags={TAG: name}, stale_tag=TAG, datasets=[])
    return live


def log(live: LiveRun, *steps: int) -> None:
    for step in steps:
        live.log_metrics([("train/loss", 1.0 / step, step)])
        time.sleep(0.002)  # each at its own millisecond


def wait_logged(live: LiveRun, *steps: int) -> None:
    deadline = time.monotonic() + 120
    while not {("train/loss", step) for step in steps} <= live.logged:
        assert time.monotonic() < deadline, live.logged
        time.sleep(0.05)


def read_history(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    """Return steps and values of a metric, in the order in which they were logged."""
    history = client.get_metric_history(run_id, name)
    return [(point.step, point.value) for point in sorted(history, key=lambda point: (point.timestamp, point.step))]
