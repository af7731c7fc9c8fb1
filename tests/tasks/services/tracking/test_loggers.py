"""TensorBoard and Weights & Biases, for real and offline."""

import time
from pathlib import Path

import pytest
from PIL import Image

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.manifests.training import LossRow
from tasks.publishing.registry import SAMPLES, TrackedRun, track_run
from tasks.services.config import TrackingConfig
from tasks.services.tracking.base import NoTracker, Tracker
from tasks.services.tracking.loggers import TensorboardLogger, Trackers, WandbLogger
from tasks.services.tracking.open import open_tracker
from tests.support.config import make_config


def publish(tracker: Tracker, folder: Path) -> None:
    for name in ("model", "report", SAMPLES):
        (folder / "published" / name).mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "published" / SAMPLES / "step-00000002.png")
    track_run(
        tracker,
        TrackedRun(
            name="a run",
            params={"seed": "23"},
            publication_key="k",
            tags={"t": "1"},
            losses=[LossRow(step=step, loss=1.0 / step) for step in range(1, 5)],
            figures={"tuned/dino": 0.5},
            folder=folder / "published",
            registered_model=None,
        ),
    )


def test_tensorboard_logs_scalars_and_images(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    publish(TensorboardLogger(make_config(TrackingConfig), folder=tmp_path), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "a run"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")][:2] == [(1, 1.0), (2, 0.5)]
    assert events.Scalars("tuned/dino")[0].value == 0.5
    assert [event.step for event in events.Images(SAMPLES)] == [2]


def test_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    publish(WandbLogger(make_config(TrackingConfig), folder=tmp_path), tmp_path)
    run = next((tmp_path / "wandb").glob("offline-run-*"))
    words = (b"train/loss", b"tuned/dino", SAMPLES.encode())
    stored, deadline = b"", time.monotonic() + 60
    # W&B's service process writes the file, on a busy machine after `finish` has returned.
    while not all(word in stored for word in words) and time.monotonic() < deadline:
        time.sleep(0.1)
        stored = next(run.glob("*.wandb")).read_bytes()
    assert [word for word in words if word not in stored] == []
    assert list(run.glob("files/media/images/**/*.png"))


def test_additional_trackers_receive_the_same_run(tmp_path: Path) -> None:
    tracker = open_tracker(make_config(TrackingConfig, kind="none", loggers=("tensorboard",)), folder=tmp_path)
    assert isinstance(tracker, Trackers)
    assert isinstance(tracker.first, NoTracker)
    publish(tracker, tmp_path)
    assert list((tmp_path / "tensorboard" / "a run").glob("events.*"))


def test_wandb_needs_a_key_only_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    online = WandbLogger(make_config(TrackingConfig, wandb_mode="online"), folder=tmp_path)
    with pytest.raises((ConfigError, ServiceUnavailable), match="wandb_mode=offline"):
        online.start(name="a run", params={}, tags={})
