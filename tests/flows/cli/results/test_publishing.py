"""A run's model copied elsewhere: complete and verified, or without a manifest."""

import json
from pathlib import Path

import pytest

from flows.cli.results import publishing
from flows.cli.results.publishing import PUBLISHED, open_destination, publish_run
from flows.runs.records import link_model
from tasks.errors import ArtifactCorrupt, ConfigError
from tasks.manifests.publishing import Publication
from tasks.services.config import StoreConfig
from tasks.services.store.base import Store
from tasks.services.store.local import LocalStore
from tasks.services.store.open import open_store
from tasks.stage.cache import StageFolder


class OneRun:
    """A finished run, as far as publishing reads it."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = type("Config", (), {"store": config})
        self.summary = type("Summary", (), {"run_id": "a-run"})

    def find_stage_key(self, stage: str) -> str:
        assert stage == "publishing"
        return "k"


def store_publication(store: Store, *, weights: bytes = b"weights") -> None:
    folder = StageFolder(store, "publishing", "k")
    report, grid = folder.put("report/index.html", b"<html>"), folder.put("samples.png", b"p")
    model = (folder.put("model/unet/weights.safetensors", weights), folder.put("model/README.md", b"card"))
    folder.finish(
        Publication(
            **folder.head(1, counts={}), registered_model=None, registered_version=None, tracking_run_id=None,
            report=report, sample_grid=grid, model=model,
        )
    )  # fmt: skip


@pytest.fixture
def config(s3_config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreConfig:
    """A store with one published run."""
    own = s3_config.model_copy(update={"kind": "local", "folder": str(tmp_path / "store")})
    store_publication(open_store(own))
    monkeypatch.setattr(publishing, "find_run", lambda output, name: output / name)
    monkeypatch.setattr(publishing, "read_run", lambda folder: OneRun(own))
    return own


def publish(to: str) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    assert publish_run(Path("runs"), "a-run", to, on_progress=lambda done, total: seen.append((done, total))) == 0
    return seen


def test_a_model_is_copied_to_a_folder_and_again_without_harm(config: StoreConfig, tmp_path: Path) -> None:
    to = tmp_path / "a place"
    assert publish(str(to))[-1] == (3, 3)
    assert (to / "model" / "unet" / "weights.safetensors").read_bytes() == b"weights"
    assert (to / "report" / "index.html").is_file()
    told = json.loads((to / PUBLISHED).read_text())
    assert told["run"] == "a-run"
    assert set(told["files"]) == {"model/unet/weights.safetensors", "model/README.md", "report/index.html"}
    publish(str(to))


def test_a_model_is_copied_to_a_bucket(config: StoreConfig, s3_config: StoreConfig) -> None:
    publish(f"s3://{s3_config.bucket}/models/rex/")
    there = open_destination(f"s3://{s3_config.bucket}/models/rex", config)
    assert there.find_bytes("model/README.md") == b"card"
    assert there.find_bytes(PUBLISHED) is not None


def test_another_model_at_the_destination_is_not_overwritten(config: StoreConfig, tmp_path: Path) -> None:
    publish(str(tmp_path / "to"))
    store_publication(open_store(config), weights=b"other weights")
    with pytest.raises(ConfigError, match="holds another model"):
        publish(str(tmp_path / "to"))
    assert (tmp_path / "to" / "model" / "unet" / "weights.safetensors").read_bytes() == b"weights"


def test_without_all_files_there_is_no_manifest(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = LocalStore.compute_sha256

    def compute_changed(store: LocalStore, key: str) -> str | None:
        return "0" * 64 if key == "model/README.md" else compute(store, key)

    monkeypatch.setattr(LocalStore, "compute_sha256", compute_changed)
    with pytest.raises(ArtifactCorrupt, match="arrived changed; publish again"):
        publish(str(tmp_path / "to"))
    assert not (tmp_path / "to" / PUBLISHED).exists()
    monkeypatch.setattr(LocalStore, "compute_sha256", compute)
    publish(str(tmp_path / "to"))
    assert (tmp_path / "to" / PUBLISHED).exists()


@pytest.mark.parametrize("to", ["http://x/y", "s3://UPPER/x", "gs://bucket"])
def test_a_destination_of_another_kind_is_refused(config: StoreConfig, to: str) -> None:
    with pytest.raises(ConfigError, match="give a folder or s3://BUCKET/PREFIX"):
        open_destination(to, config)


def test_a_runs_folder_links_its_model_and_both_may_move(tmp_path: Path) -> None:
    (tmp_path / "runs" / "store" / "model").mkdir(parents=True)
    run = tmp_path / "runs" / "one"
    run.mkdir()
    for _ in range(2):
        link_model(run, "../store/model")
    link_model(tmp_path / "runs", "s3://bucket/model")
    assert not (tmp_path / "runs" / "model").is_symlink()
    moved = (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert (moved / "one" / "model").resolve() == moved / "store" / "model"
