"""Tracking with a real MLflow on SQLite."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.manifests.training import LossRow
from tasks.publishing.registry import SAMPLES, TrackedRun, track_run
from tasks.services.config import TrackingConfig
from tasks.services.tracking import mlflow_files
from tasks.services.tracking.base import DatasetInfo, NoTracker
from tasks.services.tracking.live import LiveRun
from tasks.services.tracking.mlflow_files import find_artifact_location
from tasks.services.tracking.mlflow_tracker import MlflowTracker, create_database
from tasks.services.tracking.open import RunDescription, open_live, open_tracker
from tests.support.cli_sandbox import ROOT
from tests.support.config import make_config


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose database is migrated once."""
    folder = tmp_path_factory.mktemp("tracking")
    for name in ("model", "report"):
        (folder / "published" / name).mkdir(parents=True)
        (folder / "published" / name / "file.txt").write_text(name)
    (folder / "published" / SAMPLES).mkdir()
    for step in (5, 10):
        Image.new("RGB", (8, 8), "red").save(folder / "published" / SAMPLES / f"step-{step:08}.png")
    return folder


def publish(place: Path, *, key: str) -> tuple[MlflowTracker, str | None]:
    tracker = MlflowTracker(make_config(TrackingConfig), folder=place)
    _, version = track_run(
        tracker,
        TrackedRun(
            name="run",
            params={"a": "1" * 7000},
            publication_key=key,
            tags={"t": "1"},
            losses=[LossRow(step=s, loss=1.0 / s) for s in range(1, 1203)],
            figures={"tuned/dino": 0.5},
            folder=place / "published",
            registered_model="a-model",
        ),
    )
    return tracker, version


def test_a_published_run_has_params_metrics_and_a_registered_version(place: Path) -> None:
    tracker, version = publish(place, key="k1")
    run = tracker.client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.params["a"]) == 6000
    assert len(tracker.client.get_metric_history(tracker.run_id, "train/loss")) == 1202
    assert run.data.metrics["tuned/dino"] == 0.5
    found = tracker.client.get_model_version_by_alias("a-model", "latest-tuned")
    assert (str(found.version), found.run_id) == (version, tracker.run_id)


def test_training_samples_are_images_with_steps(place: Path) -> None:
    tracker, _ = publish(place, key="images")
    files = [Path(file.path).name for file in tracker.client.list_artifacts(tracker.run_id, "images")]
    # The names that the UI's slider reads: key, step, time, id.
    steps = {int(name.split("+")[2]) for name in files if name.startswith(f"{SAMPLES}+step+") and name.endswith(".png")}
    assert steps == {5, 10}


def test_publishing_again_after_an_interrupt_leaves_one_run_and_one_version(place: Path) -> None:
    first, _ = publish(place, key="k2")
    second, version = publish(place, key="k2")
    experiment = second.find_experiment()
    runs = second.client.search_runs([experiment], "tags.`likeness.publication` = 'k2'")
    assert [run.info.run_id for run in runs] == [second.run_id]
    versions = second.client.search_model_versions("name='a-model'")
    assert first.run_id not in {v.run_id for v in versions}
    assert version in {str(v.version) for v in versions}


def test_an_unreachable_server_is_a_one_line_error(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = open_tracker(make_config(TrackingConfig, uri=f"http://127.0.0.1:{free_port}"), folder=tmp_path)
    with pytest.raises(ServiceUnavailable, match=f"tracking at http://127.0.0.1:{free_port}"):
        tracker.start(name="x", params={}, tags={})


def test_tracking_none_writes_nothing(tmp_path: Path) -> None:
    tracker = open_tracker(make_config(TrackingConfig, kind="none"), folder=tmp_path)
    assert isinstance(tracker, NoTracker)
    assert tracker.start(name="x", params={}, tags={}) is None
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_logged_during_training_and_complete_after_publishing(tmp_path: Path) -> None:
    (tmp_path / "published" / "report").mkdir(parents=True)
    tracker = MlflowTracker(make_config(TrackingConfig), folder=tmp_path)
    live = LiveRun(tracker, "run", {"a": "1"}, {"mlflow.note.content": "One fish"})
    dataset = DatasetInfo(name="subject", digest="d" * 64, source="01-subject/k", context="training")
    live.begin(tags={"likeness.training": "k1"}, stale_tag="likeness.training", datasets=[dataset])
    live.log_metrics([("train/loss", 0.5, 2)])
    watcher = MlflowTracker(make_config(TrackingConfig), folder=tmp_path)
    deadline = time.monotonic() + 60
    while not live.logged:
        assert time.monotonic() < deadline, "nothing was sent while training"
        time.sleep(0.05)
    run = watcher.client.get_run(live.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.metrics == {"train/loss": 0.5}
    assert run.data.tags["mlflow.note.content"] == "One fish"
    assert run.data.tags["mlflow.source.name"] == "likeness"
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["subject"]
    run_id, _ = track_run(
        tracker,
        TrackedRun(
            name="run",
            params={},
            publication_key="k9",
            tags={},
            figures={},
            losses=[LossRow(step=step, loss=1.0 / step) for step in (1, 2, 3)],
            folder=tmp_path / "published",
            registered_model=None,
        ),
        live=live,
    )
    assert run_id == live.run_id
    history = watcher.client.get_metric_history(run_id, "train/loss")
    assert sorted(point.step for point in history) == [1, 2, 3]
    assert watcher.client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize("interval", [0.2, None])
def test_system_metrics_are_sampled_while_live(tmp_path: Path, interval: float | None) -> None:
    config = make_config(TrackingConfig, system_metrics_interval=interval)
    tracker = MlflowTracker(config, folder=tmp_path)
    live = open_live(config, tracker, RunDescription(tmp_path / "run", {}, {}))
    live.begin(tags={"t": "1"}, stale_tag="t", datasets=[])
    deadline = time.monotonic() + (120 if interval else 1)
    while len(live.logged) < 10 and time.monotonic() < deadline:
        time.sleep(0.1)
    live.take_over()
    metrics = tracker.client.get_run(live.run_id).data.metrics
    live.abandon()
    if interval is None:
        assert metrics == {}
        return
    history = tracker.client.get_metric_history(live.run_id, "system/system_memory_usage_percentage")
    assert [point.step for point in history] == list(range(len(history)))
    assert len(history) >= 2
    assert 0 < history[0].value < 100
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= set(metrics)


def test_a_failed_or_killed_run_does_not_stay_in_running_status(tmp_path: Path) -> None:
    runs = []
    for name in ("killed", "failed"):
        tracker = MlflowTracker(make_config(TrackingConfig), folder=tmp_path)
        live = LiveRun(tracker, name, {})
        live.begin(tags={"likeness.training": "k1"}, stale_tag="likeness.training", datasets=[])
        live.drain()
        runs.append(live)
    runs[1].abandon()
    statuses = [runs[1].tracker.client.get_run(live.run_id).info.status for live in runs]  # type: ignore[attr-defined]
    assert statuses == ["KILLED", "FAILED"]


def test_an_unreachable_server_does_not_block_training(tmp_path: Path, free_port: int, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    live = LiveRun(
        MlflowTracker(make_config(TrackingConfig, uri=f"http://127.0.0.1:{free_port}"), folder=tmp_path), "run", {}
    )
    live.begin(tags={"t": "1"}, stale_tag="t", datasets=[])
    live.log_metrics([("train/loss", 0.5, 2)])
    live.abandon()
    assert not live.is_open
    assert not live.logged


def test_an_unreachable_server_is_detected_without_importing_mlflow(tmp_path: Path, free_port: int) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tasks.services.config import TrackingConfig\n"
        "from tests.support.config import make_config\n"
        "from tasks.services.tracking.open import RunDescription, open_live, open_tracker\n"
        "from tasks.errors import ServiceUnavailable\n"
        "for uri in sys.argv[1:]:\n"
        "    try: open_tracker(make_config(TrackingConfig, uri=uri), folder=Path('x')).check()\n"
        "    except ServiceUnavailable as error: print(error)\n"
        "print('mlflow' in sys.modules)\n"
    )
    uris = [f"http://127.0.0.1:{free_port}", f"postgresql://127.0.0.1:{free_port}/db"]
    done = subprocess.run([sys.executable, "-c", code, *uris], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert [f"tracking at {uri} does not answer" in line for uri, line in zip(uris, lines, strict=False)] == [
        True,
        True,
    ]
    assert lines[-1] == "False"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:abc", "postgresql://h:abc/db", "http://[::1", "http://a b/"])
def test_an_invalid_tracking_uri_is_a_one_line_error(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tracking at [^\n]*; set tracking.uri or tracking=none$"):
        MlflowTracker(make_config(TrackingConfig, uri=uri), folder=tmp_path).check()


def test_a_server_other_than_mlflow_is_a_one_line_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH_9\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConfigError, match=r"is no MLflow server: BadStatusLine .*; set tracking.uri"):
            MlflowTracker(
                make_config(TrackingConfig, uri=f"http://127.0.0.1:{server.getsockname()[1]}"), folder=tmp_path
            ).check()
        thread.join()


def test_a_damaged_database_file_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"junk" * 999)
    with pytest.raises(ConfigError, match=r"mlflow.db: file is not a database; move the file away"):
        MlflowTracker(make_config(TrackingConfig), folder=tmp_path).check()


def test_two_concurrent_first_starts_both_succeed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tasks.services.config import TrackingConfig\n"
        "from tests.support.config import make_config\n"
        "from tasks.services.tracking.mlflow_tracker import MlflowTracker\n"
        "tracker = MlflowTracker(make_config(TrackingConfig), folder=Path(sys.argv[1]))\n"
        "print(tracker.start(name='x', params={}, tags={}))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) for _ in range(2)]
    told = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert len({out for out, _ in told}) == 2


def test_a_process_killed_while_it_creates_the_database_leaves_none(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "import alembic.command\n"
        "alembic.command.upgrade = lambda *words, **named: os._exit(9)\n"  # with the first tables created
        "from tasks.services.tracking.mlflow_tracker import create_database\n"
        "create_database(Path(sys.argv[1]))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert killed.returncode == 9
    [left] = tmp_path.glob(".mlflow-*/mlflow.db")
    assert not (tmp_path / "mlflow.db").exists()
    assert MlflowTracker(make_config(TrackingConfig), folder=tmp_path).start(name="x", params={}, tags={})
    assert not left.parent.exists()


def cut_off(folder: Path, statements: str) -> MlflowTracker:
    """Return the tracker of a folder with a copy of a database, after some statements."""
    folder.mkdir()
    shutil.copy(folder.parent / "mlflow.db", folder)
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection, connection:
        connection.executescript(statements)
    return MlflowTracker(make_config(TrackingConfig), folder=folder)


def test_a_database_whose_creation_was_cut_off_is_created_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mlflow_files, "UNFINISHED_SECONDS", 0.1)
    assert MlflowTracker(make_config(TrackingConfig), folder=tmp_path).start(name="x", params={}, tags={})
    cut = "CREATE TABLE _alembic_tmp_experiments (name TEXT)", "UPDATE alembic_version SET version_num = '451aebb31d03'"
    older = cut_off(tmp_path / "older", cut[1])
    with pytest.raises(ServiceUnavailable, match="out-of-date database schema"):
        older.start(name="x", params={}, tags={})  # it holds a run
    for number, statements in enumerate((";".join(cut), cut[1], "DROP TABLE alembic_version")):
        tracker = cut_off(tmp_path / str(number), f"DELETE FROM runs; {statements}")
        (tracker.folder / "mlflow.db-journal").touch()  # SQLite would apply it to the new file
        assert tracker.start(name="x", params={}, tags={})
        assert {path.name for path in tracker.folder.iterdir()} >= {"mlflow.db", "mlflow.db.unfinished"}
        assert not list(tracker.folder.glob(".mlflow-*"))
        assert not (tracker.folder / "mlflow.db-journal").exists()
    assert "was created by half and holds no run; it is now mlflow.db.unfinished" in caplog.text


def test_a_database_that_a_server_creates_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = mlflow_files.remove_journals

    def create(database: Path) -> None:
        remove(database)
        database.write_bytes(b"of a server")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_files, "remove_journals", create)
        mlflow_files.make_database(tmp_path / "mlflow.db", default_artifacts="")
    assert (tmp_path / "mlflow.db").read_bytes() == b"of a server"


@pytest.mark.parametrize(("is_served", "start"), [(True, "mlflow-artifacts:/"), (False, "/")])
def test_the_default_experiment_keeps_artifacts_where_its_server_does(
    tmp_path: Path, is_served: bool, start: str
) -> None:
    create_database(tmp_path, is_served=is_served)
    assert find_artifact_location(tmp_path / "mlflow.db", "Default").startswith(start)


def test_a_file_system_without_hard_links_gets_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert MlflowTracker(make_config(TrackingConfig), folder=tmp_path).start(name="x", params={}, tags={})
    assert not list(tmp_path.glob(".mlflow-*"))


def test_a_copied_folder_never_writes_into_the_original(place: Path, tmp_path: Path) -> None:
    first, version = publish(place, key="k3")
    copy = tmp_path / "a copy é"
    shutil.copytree(place, copy)
    before = sorted(path.relative_to(place) for path in (place / "artifacts").rglob("*"))
    second = MlflowTracker(make_config(TrackingConfig), folder=copy)
    assert second.has_artifacts(str(first.run_id), ("report", "model"))
    assert second.client.get_run(first.run_id).info.artifact_uri.startswith(copy.as_uri())
    assert second.client.get_model_version("a-model", version).source.startswith(copy.as_uri())
    publish(copy, key="k4")
    assert sorted(path.relative_to(place) for path in (place / "artifacts").rglob("*")) == before
    shutil.rmtree(copy / "artifacts" / str(first.run_id))
    assert not second.has_artifacts(str(first.run_id), ("report",))
    assert MlflowTracker(make_config(TrackingConfig), folder=place).has_artifacts(str(first.run_id), ("report",))


def test_artifacts_and_versions_missing_on_the_server_are_detected(place: Path) -> None:
    tracker, version = publish(place, key="k5")
    run_id = str(tracker.run_id)
    assert tracker.has_artifacts(run_id, ("report", "model"))
    assert not tracker.has_artifacts(run_id, ("report", "nothing"))
    assert not tracker.has_artifacts("0" * 32, ("report",))
    assert tracker.has_version("a-model", str(version))
    assert not tracker.has_version("a-model", "999")
    assert not tracker.has_version("none", "1")
    tracker.client.delete_run(run_id)
    assert not tracker.has_artifacts(run_id, ("report",))


LOAD = """
import mlflow
from diffusers import StableDiffusionPipeline

folder = mlflow.artifacts.download_artifacts("models:/tiny@champion")
pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
print(pipeline("a photo of sks fish", num_inference_steps=1, output_type="np").images.shape)
"""


def test_a_registered_model_loads_by_its_alias_through_mlflow_and_diffusers(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    (tmp_path / "published" / "report").mkdir(parents=True)
    (tmp_path / "published" / "model").symlink_to(tiny_model_folder)
    tracker = MlflowTracker(make_config(TrackingConfig), folder=tmp_path)
    run = TrackedRun(
        name="run", params={}, publication_key="k", tags={}, losses=[], figures={}, folder=tmp_path / "published",
        registered_model="tiny",
    )  # fmt: skip
    _, version = track_run(tracker, run)
    tracker.set_alias("tiny", "champion", str(version))
    # In a process of its own, with what a person sets.
    variables = {"MLFLOW_TRACKING_URI": tracker.uri, "MLFLOW_REGISTRY_URI": tracker.uri}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, check=False, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(1, 32, 32, 3)"


def test_what_the_server_refuses_is_not_an_outage(place: Path) -> None:
    tracker, _ = publish(place, key="refused")
    tracker.client.delete_run(tracker.run_id)
    with pytest.raises(ConfigError, match=f"tracking at {tracker.uri}: .*active") as raised:
        tracker.set_tag("a", "b")
    assert not raised.value.is_retryable


def test_a_run_has_a_link_where_a_server_shows_its_database(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = MlflowTracker(make_config(TrackingConfig), folder=place)
    monkeypatch.delenv("LIKENESS_MLFLOW_URL", raising=False)
    assert tracker.find_link("r1") == ""
    monkeypatch.setenv("LIKENESS_MLFLOW_URL", "http://me:secret@127.0.0.1:5000/")
    link = tracker.find_link("r1")
    assert link.endswith(f"/#/experiments/{tracker.find_experiment()}/runs/r1")
    assert "secret" not in link
    assert tracker.find_link("r1", artifact="report/index.html") == f"{link}/artifacts/report/index.html"
    assert open_tracker(make_config(TrackingConfig, kind="none"), folder=place).find_link("r1") == ""


def test_a_link_leads_to_where_people_open_the_server_and_not_to_its_address_within_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MlflowTracker(make_config(TrackingConfig, uri="http://mlflow:5000"), folder=tmp_path)
    monkeypatch.setattr(tracker, "find_experiment", lambda: "7")  # there is no such host
    monkeypatch.delenv("LIKENESS_MLFLOW_URL", raising=False)
    assert tracker.find_link("r1") == "http://mlflow:5000/#/experiments/7/runs/r1"
    monkeypatch.setenv("LIKENESS_MLFLOW_URL", "")  # as a template leaves a variable that the worker does not have
    assert tracker.find_link("r1") == "http://mlflow:5000/#/experiments/7/runs/r1"
    monkeypatch.setenv("LIKENESS_MLFLOW_URL", "https://mlflow.example.com")
    assert tracker.find_link("r1") == "https://mlflow.example.com/#/experiments/7/runs/r1"


def test_an_experiment_whose_artifacts_lie_behind_a_server_is_refused_before_the_run(tmp_path: Path) -> None:
    tracker = MlflowTracker(make_config(TrackingConfig, experiment="mine"), folder=tmp_path)
    tracker.client.create_experiment("mine", artifact_location="mlflow-artifacts:/1")
    with pytest.raises(
        ConfigError, match="artifacts of experiment 'mine' are reached through an MLflow server"
    ) as caught:
        tracker.check()
    assert "\n" not in str(caught.value)
    other = MlflowTracker(make_config(TrackingConfig, experiment="other"), folder=tmp_path)
    other.check()
    other.start(name="run", params={}, tags={})
    other.check()
