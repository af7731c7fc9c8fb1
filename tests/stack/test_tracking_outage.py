"""A real MLflow server that is down at the start, in the middle or at the end: nothing is lost or stored twice."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.request import RunRequest
from conf.sweep import read_sweep
from tasks.errors import ServiceUnavailable
from tasks.manifests.run_summary import RunSummary
from tasks.manifests.training import LossRow
from tasks.publishing.registry import TrackedRun, track_run
from tasks.services.config import TrackingConfig
from tasks.services.tracking.journal import JOURNAL_NAME
from tasks.services.tracking.live import LiveRun
from tasks.services.tracking.mlflow_tracker import MlflowTracker
from tasks.services.tracking.open import wait_reachable, warn_unreachable
from tests.support.cli_sandbox import QUICK, CliSandbox
from tests.support.config import make_config
from tests.support.mlflow_server import MlflowServer, mlflow_server
from tests.support.sweep import RATE, FakeRuns, sweep
from tests.support.tracking import TAG, begin, log, read_history, wait_logged

STEPS = range(1, 7)
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server that no test has started yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mlflow_server(tmp_path_factory.mktemp("server"), port) as server:
        yield server


def configure(server: MlflowServer) -> TrackingConfig:
    return make_config(TrackingConfig, uri=server.url)


def publish(live: LiveRun, output: Path) -> str | None:
    (output / "published" / "report").mkdir(parents=True, exist_ok=True)
    run = TrackedRun(
        name=live.name,
        params={},
        publication_key=live.name,
        tags={},
        figures={"tuned/dino": 0.5},
        losses=[LossRow(step=step, loss=1.0 / step) for step in STEPS],
        folder=output / "published",
        registered_model=None,
    )
    return track_run(live.tracker, run, live=live)[0]


def check_published(server: MlflowServer, output: Path, run_id: str | None) -> None:
    client = MlflowTracker(configure(server), folder=output).client
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "23"}
    assert read_history(client, str(run_id), "train/loss") == [(step, 1.0 / step) for step in STEPS]
    same = client.search_runs([run.info.experiment_id], f"tags.`{TAG}` = '{run.data.tags[TAG]}'")
    assert len(same) == 1


def test_metrics_of_an_outage_arrive_in_order_and_once(server: MlflowServer, tmp_path: Path) -> None:
    config, notes = configure(server), list[str]()
    warn_unreachable(MlflowTracker(config, folder=tmp_path), notes.append)
    assert "does not answer" in notes[0]
    assert notes[0].startswith("warning: ")
    started_ms = time.time() * 1000
    first = begin(config, tmp_path, "down-at-the-start")
    log(first, 1, 2, 3)
    assert (tmp_path / "down-at-the-start" / JOURNAL_NAME).read_bytes().count(b"\n") == 4
    server.start()
    wait_logged(first, 1, 2, 3)
    log(first, 4)
    run_id = publish(first, tmp_path)
    check_published(server, tmp_path, run_id)
    assert isinstance(first.tracker, MlflowTracker)
    # As of when the run began, not of when the server came up.
    assert first.tracker.client.get_run(run_id).info.start_time - started_ms < 2000

    second = begin(config, tmp_path, "down-in-the-middle")
    log(second, 1, 2)
    wait_logged(second, 1, 2)
    server.kill()
    log(second, 3, 4, 5)
    server.start()
    wait_logged(second, 3, 4, 5)
    check_published(server, tmp_path, publish(second, tmp_path))

    third = begin(config, tmp_path, "down-at-the-end")
    log(third, 1, 2)
    wait_logged(third, 1, 2)
    server.kill()
    log(third, 3)
    waits: list[str] = []
    with pytest.raises(ServiceUnavailable, match="does not answer"):
        wait_reachable(config.model_copy(update={"max_wait_seconds": 1.0}), third.tracker, on_wait=waits.append)
    assert set(waits) == {"the tracking server"}
    third.abandon()
    assert (tmp_path / "down-at-the-end" / JOURNAL_NAME).is_file()
    server.start()
    # As the next run does.
    fourth = begin(config, tmp_path, "next")
    log(fourth, *STEPS)
    check_published(server, tmp_path, publish(fourth, tmp_path))
    client = fourth.tracker.client  # type: ignore[attr-defined]
    assert client.get_run(third.journal.run_id).info.status == "FAILED"
    assert [step for step, _ in read_history(client, str(third.journal.run_id), "train/loss")] == [1, 2, 3]
    assert list(tmp_path.glob(f"*/{JOURNAL_NAME}")) == []


def test_a_sweep_goes_on_while_the_server_is_down_and_tracks_every_trial_once(
    server: MlflowServer, tmp_path: Path
) -> None:
    server.kill()
    runs = FakeRuns()

    def run(request: RunRequest) -> RunSummary:
        if len(runs.requests) == 1:  # the first trial has ended
            server.start()
        return runs(request)

    words = [f"output_dir={tmp_path}", f"tracking.uri={server.url}", f"{RATE}=1e-4,2e-4,3e-4"]
    outcome = sweep(read_sweep(words, {"study": "outage"}), run)
    assert len(outcome.trials) == 3
    tracker = MlflowTracker(configure(server), folder=tmp_path)
    [parent] = [run for run in tracker.find_runs("likeness.kind", "sweep") if run.info.run_name == "outage"]
    assert parent.info.status == "FINISHED"
    children = tracker.find_runs("mlflow.parentRunId", parent.info.run_id)
    assert sorted(run.data.metrics["tuned/dino"] for run in children) == [1e-4, 2e-4, 3e-4]
    assert {run.info.status for run in children} == {"FINISHED"}


@pytest.mark.skipif("LIKENESS_CHAOS" not in os.environ, reason="takes minutes; run by make chaos")
def test_a_run_whose_publication_fails_is_failed_and_its_resume_publishes_it(
    server: MlflowServer, tmp_path: Path
) -> None:
    place = CliSandbox(tmp_path)
    server.kill()
    words = [f"tracking.uri={server.url}", "tracking.max_wait_seconds=0"]
    down = place.likeness("run", *QUICK, *words, timeout=600)
    assert down.returncode == 4, down.stderr
    assert "does not answer" in down.stderr.strip().splitlines()[-1]
    assert down.stderr.count("warning: tracking at") == 1
    failed = place.newest()
    assert failed["status"] == "failed"
    assert (place.output / failed["run_id"] / JOURNAL_NAME).is_file()
    server.start()
    up = place.likeness("resume", failed["run_id"], timeout=600)
    assert up.returncode == 0, up.stderr
    finished = place.newest()
    assert finished["stages"]["training"]["cached"]
    assert finished["registered"]["model"] == "likeness-fish"
    assert not list(place.output.glob(f"*/{JOURNAL_NAME}"))
    client = MlflowTracker(configure(server), folder=tmp_path).client
    experiment = client.get_experiment_by_name("likeness").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment], "attributes.run_name LIKE '%fish%'")}
    assert {name: run.info.status for name, run in runs.items()} == {
        failed["run_id"]: "FAILED",
        finished["run_id"]: "FINISHED",
    }
    num_steps = finished["stages"]["training"]["counts"]["steps"]
    whole = [step for step, _ in read_history(client, runs[finished["run_id"]].info.run_id, "train/loss")]
    live = [step for step, _ in read_history(client, runs[failed["run_id"]].info.run_id, "train/loss")]
    assert whole == list(range(1, num_steps + 1))
    assert live == sorted(set(live))  # of the steps that training reports while it runs
    assert live[-1] == num_steps
    promoted = place.likeness("promote", "latest", "--force")
    assert promoted.returncode == 0, promoted.stderr
    champion = client.get_model_version_by_alias("likeness-fish", "champion")
    assert champion.tags["likeness.training"] == finished["stages"]["training"]["key"]
