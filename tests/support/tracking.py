"""Live tracking as a run does it, and what a server has of it."""

import time
from pathlib import Path
from typing import Any

from tasks.redaction import redact_url
from tasks.services.config import TrackingConfig
from tasks.services.tracking.base import NoTracker
from tasks.services.tracking.journal import JOURNAL_NAME, Journal, Record
from tasks.services.tracking.live import LiveRun
from tasks.services.tracking.mlflow_tracker import MlflowTracker
from tasks.services.tracking.open import RunDescription, open_live

TAG = "likeness.training"


def begin(config: TrackingConfig, output: Path, name: str, *, training_key: str = "") -> LiveRun:
    """Open the live tracking of a run, by default with a training of its own."""
    tracker = MlflowTracker(config, folder=output)
    live = open_live(config, tracker, RunDescription(output / name, {"seed": "23"}, {"likeness.config": "c"}))
    live.begin(tags={TAG: training_key or name}, stale_tag=TAG, datasets=[])
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


def leave_unsent(config: TrackingConfig, output: Path, name: str, *, training_key: str = "") -> Path:
    """Return the journal of a run that was killed while the server was down: not even its start was sent."""
    journal = Journal(output / name / JOURNAL_NAME)
    live = LiveRun(
        NoTracker(), name, {"seed": "23"}, journal=journal, server=redact_url(config.uri), experiment=config.experiment
    )
    journal.open()
    live.queue_start(tags={TAG: training_key or name}, stale_tag=TAG, datasets=[])
    journal.append(Record(kind="metrics", rows=(("train/loss", 0.5, 1),)))
    journal.close()
    return output / name / JOURNAL_NAME
