"""A process that dies, or a server that refuses, between a tracking record and its acknowledgement."""

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ServiceUnavailable
from tasks.manifests.base import ObjectRef
from tasks.manifests.publishing import Publication
from tasks.publishing.steps import find_missing_effect
from tasks.services.config import TrackingConfig
from tasks.services.store.local import LocalStore
from tasks.services.tracking.base import RUN_TAG
from tasks.services.tracking.journal import JOURNAL_NAME
from tasks.services.tracking.mlflow_tracker import MlflowTracker
from tasks.services.tracking.open import send_left_over, wait_reachable
from tasks.stage.context import Runtime
from tasks.stage.progress import LineProgress
from tests.support.cli_sandbox import ROOT
from tests.support.config import make_config
from tests.support.tracking import begin, log, read_history, wait_logged


def test_a_publication_waits_as_long_as_configured_for_a_server(tmp_path: Path, free_port: int) -> None:
    config = make_config(TrackingConfig, uri=f"http://127.0.0.1:{free_port}", max_wait_seconds=0)
    tracker, waits = MlflowTracker(config, folder=tmp_path), list[str]()
    with pytest.raises(ServiceUnavailable):
        wait_reachable(config, tracker, on_wait=waits.append)
    assert waits == []
    with ThreadingHTTPServer(("127.0.0.1", free_port), HealthyHandler, bind_and_activate=False) as late:

        def begin_to_listen(what: str) -> None:
            if not waits:
                late.server_bind()
                late.server_activate()
                threading.Thread(target=late.serve_forever, daemon=True).start()
            waits.append(what)

        wait_reachable(config.model_copy(update={"max_wait_seconds": 60}), tracker, on_wait=begin_to_listen)
        late.shutdown()
    assert waits[0] == "the tracking server"


def test_a_cached_publication_waits_no_longer_than_configured_for_a_server(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(TrackingConfig, uri=f"http://127.0.0.1:{free_port}", max_wait_seconds=1)
    unused: Any = None
    runtime = Runtime(
        "run", LocalStore(tmp_path / "store"), llm=unused, tracker=MlflowTracker(config, folder=tmp_path),
        progress=LineProgress(), live=unused, work_folder=tmp_path,
    )  # fmt: skip
    ref = ObjectRef(key="k", size_bytes=1, sha256="0" * 64)
    publication = Publication(
        stage="publishing", stage_key="k", stage_version=1, seconds=1.0, counts={}, objects=(),
        registered_model="m", registered_version="1",
        tracking_run_id="0" * 32, report=ref, sample_grid=ref, model=(), published_step=1, published_because="",
    )  # fmt: skip
    started = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="does not answer"):
        find_missing_effect(publication, config, runtime)
    assert 1 <= time.monotonic() - started < 20  # MLflow's own retries take minutes
    assert "publishing waits for the tracking server" in "".join(capsys.readouterr())
    untracked = publication.model_copy(update={"tracking_run_id": None})
    assert find_missing_effect(untracked, config, runtime) == ""


class HealthyHandler(BaseHTTPRequestHandler):
    """Answers every request."""

    def do_GET(self) -> None:  # the name that http.server looks for
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


KILLED = """
import os, sys, time
from pathlib import Path
from tasks.services.config import TrackingConfig
from tasks.services.tracking.mlflow_tracker import MlflowTracker
from tasks.services.tracking.open import RunDescription, open_live
from tests.support.config import make_config

output, call = Path(sys.argv[1]), sys.argv[2]

class DyingTracker(MlflowTracker):
    def start(self, **words):
        return self.die_after("start", super().start(**words))

    def log_metrics(self, rows, **words):
        return self.die_after("log_metrics", super().log_metrics(rows, **words))

    def die_after(self, name, result):
        if name == call:
            os.kill(os.getpid(), 9)
        return result

config = make_config(TrackingConfig)
live = open_live(config, DyingTracker(config, folder=output), RunDescription(output / "killed", {"seed": "23"}, {}))
live.begin(tags={"likeness.training": "k"}, stale_tag="likeness.training", datasets=[])
live.log_metrics([("train/loss", 0.5, 1), ("train/lr", 0.1, 1)])
live.log_metrics([("train/loss", 0.25, 2)])
time.sleep(120)
"""


@pytest.mark.parametrize("call", ["start", "log_metrics"])
def test_a_process_killed_between_sending_and_acknowledging_leaves_no_duplicate(tmp_path: Path, call: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), call], cwd=ROOT, check=False, timeout=300)
    assert done.returncode == -9
    config = make_config(TrackingConfig)
    tracker = MlflowTracker(config, folder=tmp_path)
    [before] = tracker.find_runs(RUN_TAG, "killed")
    num_sent = len(tracker.client.get_metric_history(before.info.run_id, "train/loss"))
    assert num_sent == (1 if call == "log_metrics" else 0)
    send_left_over(config, tmp_path)
    [run] = tracker.find_runs(RUN_TAG, "killed")
    assert (run.info.run_id, run.info.status) == (before.info.run_id, "KILLED")
    assert run.data.params == {"seed": "23"}
    assert read_history(tracker.client, run.info.run_id, "train/loss") == [(1, 0.5), (2, 0.25)]
    assert read_history(tracker.client, run.info.run_id, "train/lr") == [(1, 0.1)]
    assert list(tmp_path.glob(f"*/{JOURNAL_NAME}")) == []


def test_a_refused_record_does_not_hold_up_those_after_it(tmp_path: Path) -> None:
    live = begin(make_config(TrackingConfig), tmp_path, "refused")
    live.log_metrics([("no name: \0 %", 1.0, 1)])
    log(live, 1, 2)
    wait_logged(live, 1, 2)
    live.abandon()
    assert not live.is_open


def test_the_journal_of_another_server_is_left_alone(tmp_path: Path, free_port: int) -> None:
    elsewhere = make_config(TrackingConfig, uri=f"http://127.0.0.1:{free_port}")
    live = begin(elsewhere, tmp_path, "elsewhere")
    log(live, 1)
    live.abandon()
    kept = (tmp_path / "elsewhere" / JOURNAL_NAME).read_bytes()
    send_left_over(make_config(TrackingConfig), tmp_path)
    assert (tmp_path / "elsewhere" / JOURNAL_NAME).read_bytes() == kept
    assert not (tmp_path / "mlflow.db").exists()
