"""A local stack: started once, found again, runs submitted to it survive the death of their process, stopped whole."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.cli.stack.stack import PREFECT, read_state
from flows.runs.records import list_run_folders, read_request, read_summary
from tasks.subject.photos.ingest import DEMO_FOLDER

ROOT = Path(__file__).resolve().parents[2]
LIKENESS = [sys.executable, "-m", "flows.cli.main"]
SECONDS = 900


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def likeness(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*LIKENESS, *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a running stack."""
    folder = tmp_path_factory.mktemp("a stack")
    done = likeness(folder, "up", "--prefect-port", "0", "--mlflow-port", "0")
    try:
        assert done.returncode == 0, done.stderr
        yield folder
    finally:
        processes = read_state(folder / "runs").processes
        down = likeness(folder, "down")
        assert down.stdout == "stopped: worker, MLflow server, Prefect server\n", down.stderr
        assert not any(process.is_alive() for process in processes)


@pytest.mark.timeout(SECONDS)
def test_a_second_up_finds_the_running_stack(folder: Path) -> None:
    before = read_state(folder / "runs")
    done = likeness(folder, "up")
    assert done.returncode == 0, done.stderr
    assert "found a running stack" in done.stderr
    assert read_state(folder / "runs") == before
    status = likeness(folder, "status")
    assert status.returncode == 0, status.stdout
    assert status.stdout.count(" running ") == 3


def find_trainer(pid: int) -> psutil.Process | None:
    """Return the flow run's process below a worker, once training has begun."""
    for flow_run in psutil.Process(pid).children():
        for child in flow_run.children(recursive=True):
            try:
                if "tasks.training.process.worker" in " ".join(child.cmdline()):
                    return flow_run
            except psutil.Error:
                continue
    return None


@pytest.mark.timeout(SECONDS)
def test_a_submitted_run_whose_process_is_killed_is_rescheduled_and_resumes(folder: Path) -> None:
    words = ["experiment=smoke", "training.max_train_steps=60", "training.checkpointing_steps=2"]
    follower = subprocess.Popen(
        [*LIKENESS, "submit", *words], cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    worker = read_state(folder / "runs").find("worker")
    assert worker is not None
    deadline = time.monotonic() + SECONDS
    checkpoints = "runs/work/training/*/checkpoints/step-*"
    while not list(folder.glob(checkpoints)):
        assert time.monotonic() < deadline
        assert follower.poll() is None, follower.stdout and follower.stdout.read()
        time.sleep(0.1)
    flow_run = find_trainer(worker.pid)
    assert flow_run is not None
    flow_run.send_signal(signal.SIGKILL)
    text, _ = follower.communicate(timeout=SECONDS)
    assert follower.returncode == 0, text
    assert text.count("Beginning flow run") == 2
    assert "training resumes from its checkpoint at step" in text
    [finished] = [
        summary for path in folder.glob("runs/*/summary.json")
        if (summary := json.loads(path.read_text()))["status"] == "finished"
    ]  # fmt: skip
    assert finished["stages"]["training"]["counts"]["resumed_from_step"] > 0
    assert finished["stages"]["subject"]["cached"]


def read_table(folder: Path) -> dict[str, dict[str, str]]:
    (path,) = (folder / "runs").glob("many/*/table.csv")
    return {row["name"]: row for row in csv.DictReader(path.read_text().splitlines())}


@pytest.mark.timeout(SECONDS)
def test_many_subjects_run_on_the_pool_each_once(folder: Path) -> None:
    (folder / "subjects.csv").write_text(
        "source,class_noun,name,seed\ndemo,fish,one,11\ndemo,fish,two,12\nnowhere,fish,none,\n"
    )
    words = ["run-many", "subjects.csv", "experiment=smoke"]
    done = likeness(folder, *words)
    assert done.returncode == 1, done.stderr
    rows = read_table(folder)
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses == {"one": "finished", "two": "finished", "none": "refused"}, done.stderr
    assert float(rows["one"]["dino"]) > 0
    assert done.stderr.count(": submitted as ") == 2
    count = len(list((folder / "runs").glob("*/request.json")))
    again = likeness(folder, *words)
    assert {name: row["status"] for name, row in read_table(folder).items()} == {
        "one": "unchanged", "two": "unchanged", "none": "refused",
    }, again.stderr  # fmt: skip
    assert len(list((folder / "runs").glob("*/request.json"))) == count


@pytest.mark.timeout(SECONDS)
def test_a_new_folder_of_the_inbox_becomes_exactly_one_run(folder: Path) -> None:
    rex = folder / "runs" / "store" / "subjects" / "rex"
    shutil.copytree(DEMO_FOLDER, rex)
    (rex / "subject.yaml").write_text("class_noun: fish\nsettings: {seed: 13, training.max_train_steps: 4}\n")
    request = {"subjects": "store:subjects/", "wait": False, "settle_seconds": 0,
               "base": {"experiment": "smoke", "settings": {"output_dir": str(folder / "runs")}}}  # fmt: skip
    command = ["deployment", "run", "personalize-many/personalize-many", "--watch", "--param"]
    for _ in range(2):  # as a schedule does
        done = prefect(folder, *command, f"request={json.dumps(request)}")
        assert done.returncode == 0, done.stdout + done.stderr
    record = next((folder / "runs" / "store" / "subject-runs").glob("*.json"))
    deadline = time.monotonic() + SECONDS
    while not (runs := find_runs(folder, source="store:subjects/rex/")):
        assert time.monotonic() < deadline, record.read_text()
        time.sleep(1)
    while any(read_summary(run).status == "running" for run in runs):
        assert time.monotonic() < deadline
        time.sleep(1)
    done = prefect(folder, *command, f"request={json.dumps(request)}")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = find_runs(folder, source="store:subjects/rex/")
    assert read_summary(run).status == "finished"
    assert read_summary(run).training_steps == 4


def find_runs(folder: Path, *, source: str) -> list[Path]:
    return [run for run in list_run_folders(folder / "runs") if read_request(run).request.source == source]


def prefect(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    server = read_state(folder / "runs").find(PREFECT)
    assert server is not None
    return subprocess.run(
        [sys.executable, "-m", "prefect", *words], cwd=folder, capture_output=True, text=True, timeout=SECONDS,
        check=False, env={**environment(), "PREFECT_API_URL": f"http://127.0.0.1:{server.port}/api"},
    )  # fmt: skip
