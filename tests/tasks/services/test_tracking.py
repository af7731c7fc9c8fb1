"""Tracking with a real MLflow on SQLite."""

from pathlib import Path

import pytest

from tasks.errors import ServiceUnavailable
from tasks.publishing.registry import track_run
from tasks.services.config import TrackingConfig
from tasks.services.tracking import MlflowTracker, NoTracker, open_tracker


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose database is migrated once."""
    folder = tmp_path_factory.mktemp("tracking")
    for name in ("model", "report"):
        (folder / "published" / name).mkdir(parents=True)
        (folder / "published" / name / "file.txt").write_text(name)
    return folder


def publish(place: Path, *, key: str) -> tuple[MlflowTracker, str | None]:
    tracker = MlflowTracker(TrackingConfig(), folder=place)
    _, version = track_run(
        tracker, name="run", params={"a": "1" * 7000}, publication_key=key, tags={"t": "1"},
        losses=[{"step": s, "loss": 1.0 / s} for s in range(1, 1203)], figures={"tuned/dino": 0.5},
        folder=place / "published", registered_model="a-model", is_registered=True,
    )  # fmt: skip
    return tracker, version


def test_a_published_run_has_everything(place: Path) -> None:
    tracker, version = publish(place, key="k1")
    run = tracker.client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.params["a"]) == 6000
    assert len(tracker.client.get_metric_history(tracker.run_id, "train/loss")) == 1202
    assert run.data.metrics["tuned/dino"] == 0.5
    found = tracker.client.get_model_version_by_alias("a-model", "latest-tuned")
    assert (str(found.version), found.run_id) == (version, tracker.run_id)


def test_publishing_again_after_a_cut_leaves_one_run_and_one_version(place: Path) -> None:
    first, _ = publish(place, key="k2")
    second, version = publish(place, key="k2")
    experiment = second.find_experiment()
    runs = second.client.search_runs([experiment], "tags.`likeness.publication` = 'k2'")
    assert [run.info.run_id for run in runs] == [second.run_id]
    versions = second.client.search_model_versions("name='a-model'")
    assert first.run_id not in {v.run_id for v in versions}
    assert version in {str(v.version) for v in versions}


def test_an_unreachable_server_is_one_clear_line(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = open_tracker(TrackingConfig(uri=f"http://127.0.0.1:{free_port}"), folder=tmp_path)
    with pytest.raises(ServiceUnavailable, match=f"tracking at http://127.0.0.1:{free_port}"):
        tracker.start(name="x", params={}, tags={})


def test_no_tracking_keeps_nothing(tmp_path: Path) -> None:
    tracker = open_tracker(TrackingConfig(kind="none"), folder=tmp_path)
    assert isinstance(tracker, NoTracker)
    assert tracker.start(name="x", params={}, tags={}) is None
    assert list(tmp_path.iterdir()) == []
