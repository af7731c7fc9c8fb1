"""Runs on a local stack that lose their worker, or are rescheduled while they run."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows.cli.stack.stack import WORKER, read_state
from flows.runs.records import list_summaries
from tasks.manifests.run_summary import RunSummary
from tests.stack.commands import likeness
from tests.support.prefect_api import (
    QUICK_HEARTBEATS,
    create_flow_run,
    open_api,
    read_states,
    wait_for_type,
)

SECONDS = 900
SETTINGS = ["experiment=smoke", "training.num_threads=1", "training.max_train_steps=40"]
pytestmark = [
    pytest.mark.timeout(2 * SECONDS),
    pytest.mark.skipif("LIKENESS_CHAOS" not in os.environ, reason="takes minutes; run by make chaos"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a running stack whose runs send heartbeats often."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK_HEARTBEATS.items():
            patch.setenv(name, value)
        try:
            start_stack(folder)
            yield folder
        finally:
            likeness(folder, "down")


def start_stack(folder: Path) -> None:
    done = likeness(folder, "up", "--prefect-port", "0", "--mlflow-port", "0", "--reports-port", "0")
    assert done.returncode == 0, done.stderr


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def find_worker(folder: Path) -> psutil.Process:
    worker = read_state(folder / "runs").find(WORKER)
    assert worker is not None
    return psutil.Process(worker.pid)


def is_training(folder: Path, pattern: str) -> bool:
    return any((folder / "runs" / "work" / "training").glob(pattern))


def find_summaries(folder: Path, flow_run_id: str) -> list[RunSummary]:
    """Return the attempts of a flow run, newest first."""
    return [each for each in list_summaries(folder / "runs") if each.flow_run_id == flow_run_id]


def test_a_run_survives_the_death_of_its_worker(folder: Path) -> None:
    with open_api(folder / "runs") as client:
        run = create_flow_run(client, [*SETTINGS, "seed=2", f"output_dir={folder / 'runs'}"])
        wait_until(lambda: is_training(folder, "*/heartbeat*"))
        find_worker(folder).send_signal(signal.SIGKILL)
        start_stack(folder)
        wait_for_type(client, run, "COMPLETED", "FAILED", "CANCELLED", seconds=SECONDS)
        assert [state["type"] for state in read_states(client, run)][-1] == "COMPLETED"
    [finished, *earlier] = find_summaries(folder, run)
    assert finished.status == "finished"
    assert "finished" not in {each.status for each in earlier}


def test_a_run_that_dies_together_with_its_worker_is_rescheduled_and_resumes(folder: Path) -> None:
    with open_api(folder / "runs") as client:
        words = [*SETTINGS, "seed=3", "training.checkpointing_steps=2", f"output_dir={folder / 'runs'}"]
        run = create_flow_run(client, words)
        wait_until(lambda: is_training(folder, "*/checkpoints/step-*"))
        worker = find_worker(folder)
        family = [worker, *worker.children()]  # the trainer ends with its parent
        for process in family:
            process.send_signal(signal.SIGKILL)
        start_stack(folder)
        # Nobody saw the process die: only its heartbeats are missing.
        wait_for_type(client, run, "COMPLETED", "FAILED", "CANCELLED", seconds=SECONDS)
        assert "CRASHED" in [state["type"] for state in read_states(client, run)]
    newest, killed = find_summaries(folder, run)
    assert (newest.status, killed.status) == ("finished", "killed")
    assert newest.stages["training"].counts["resumed_from_step"] > 0


def test_a_run_that_is_rescheduled_while_it_runs_is_left_to_its_first_process(folder: Path) -> None:
    with open_api(folder / "runs") as client:
        run = create_flow_run(client, [*SETTINGS, "seed=4", f"output_dir={folder / 'runs'}"])
        wait_until(lambda: is_training(folder, "*/heartbeat*"))
        # As the automation does where the death of an earlier process is reported late.
        again = {"state": {"type": "SCHEDULED"}, "force": True}
        client.post(f"/flow_runs/{run}/set_state", json=again).raise_for_status()
        wait_for_type(client, run, "COMPLETED", "FAILED", "CANCELLED", "CRASHED", seconds=SECONDS)
        assert [state["type"] for state in read_states(client, run)].count("RUNNING") == 2
    assert [each.status for each in find_summaries(folder, run)] == ["finished"]
