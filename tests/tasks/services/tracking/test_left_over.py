"""Journals that killed runs have left: sent by a later run, without harm to that run."""

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from tasks.services.config import TrackingConfig
from tasks.services.tracking.base import RUN_TAG
from tasks.services.tracking.journal import JOURNAL_NAME, Journal
from tasks.services.tracking.live import LiveRun
from tasks.services.tracking.mlflow_tracker import MlflowTracker
from tasks.services.tracking.open import send_left_over
from tests.support.config import make_config
from tests.support.tracking import TAG, begin, leave_unsent, log, read_history, wait_logged

HALF_WRITTEN = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("PRAGMA cache_size = 1")  # pages go to the file before the transaction ends
connection.execute("INSERT INTO params SELECT key || value, value, run_uuid FROM params")
connection.execute("CREATE TABLE large AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 20000) "
                   "SELECT i, hex(randomblob(50)) FROM n")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_killed_in_the_middle_of_a_transaction_leaves_a_database_that_the_next_one_opens(tmp_path: Path) -> None:
    config = make_config(TrackingConfig)
    MlflowTracker(config, folder=tmp_path).start(name="one", params={"a": "1"}, tags={RUN_TAG: "one"})
    database = tmp_path / "mlflow.db"
    done = subprocess.run([sys.executable, "-c", HALF_WRITTEN, str(database)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "mlflow.db-journal").stat().st_size, "the journal is what undoes the half-written transaction"
    tracker = MlflowTracker(config, folder=tmp_path)
    tracker.check()
    tracker.start(name="two", params={}, tags={RUN_TAG: "two"})
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count(*) FROM params").fetchone() == (1,)
        assert connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'large'").fetchone() is None


def find_run(config: TrackingConfig, output: Path, name: str) -> Any:
    [run] = MlflowTracker(config, folder=output).find_runs(RUN_TAG, name)
    return run


def test_a_left_over_journal_does_not_end_the_run_that_resumes_its_training(tmp_path: Path) -> None:
    config = make_config(TrackingConfig)
    leave_unsent(config, tmp_path, "killed", training_key="k")
    resumed = begin(config, tmp_path, "resumed", training_key="k")
    log(resumed, 1)
    wait_logged(resumed, 1)  # after the start, which sends what is left over
    statuses = {name: find_run(config, tmp_path, name).info.status for name in ("killed", "resumed")}
    resumed.abandon()
    assert statuses == {"killed": "KILLED", "resumed": "RUNNING"}


def test_a_start_that_is_sent_again_does_not_end_its_own_run(tmp_path: Path) -> None:
    config = make_config(TrackingConfig)
    words = {"name": "run", "params": {}, "tags": {TAG: "k", RUN_TAG: "run"}}
    MlflowTracker(config, folder=tmp_path).start(**words)  # whose answer was lost
    live = LiveRun(MlflowTracker(config, folder=tmp_path), "run", {})
    live.begin(tags={TAG: "k"}, stale_tag=TAG, datasets=[])
    log(live, 1)
    wait_logged(live, 1)
    status = find_run(config, tmp_path, "run").info.status
    live.abandon()
    assert status == "RUNNING"


def test_a_left_over_journal_is_sent_to_the_experiment_of_its_own_run(tmp_path: Path) -> None:
    own, other = (make_config(TrackingConfig, experiment=name) for name in ("team-a", "team-b"))
    leave_unsent(own, tmp_path, "unsent")
    killed = begin(own, tmp_path, "killed")
    log(killed, 1)
    wait_logged(killed, 1)
    killed.drain()
    killed.journal.close()  # as the kernel does; its start is acknowledged
    for path in tmp_path.glob(f"*/{JOURNAL_NAME}"):
        assert '"experiment":"team-a"' in path.read_text().replace(" ", "")
    send_left_over(other, tmp_path)
    assert MlflowTracker(other, folder=tmp_path).find_runs(RUN_TAG, "unsent") == []
    for name in ("unsent", "killed"):
        run = find_run(own, tmp_path, name)
        assert run.info.status == "KILLED"
        assert [step for step, _ in read_history(killed.tracker.client, run.info.run_id, "train/loss")] == [1]  # type: ignore[attr-defined]
    assert list(tmp_path.glob(f"*/{JOURNAL_NAME}")) == []


def test_a_left_over_journal_leaves_a_published_run_finished_and_a_deleted_one_alone(tmp_path: Path) -> None:
    config = make_config(TrackingConfig)
    for name in ("published", "deleted"):
        live = begin(config, tmp_path, name)
        log(live, 1)
        wait_logged(live, 1)
        live.drain()
        live.tracker.finish(is_failed=False)
        if name == "deleted":
            live.tracker.forget(tag=RUN_TAG, value=name)
        live.journal.close()
        reopened = Journal(tmp_path / name / JOURNAL_NAME)
        assert reopened.open()
        assert reopened.run_id == live.journal.run_id
        reopened.close()
    send_left_over(config, tmp_path)
    assert find_run(config, tmp_path, "published").info.status == "FINISHED"
    assert list(tmp_path.glob(f"*/{JOURNAL_NAME}")) == []
