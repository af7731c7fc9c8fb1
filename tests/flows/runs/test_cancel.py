"""A cancelled flow run ends, whether or not a worker watches for it."""

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prefect.exceptions import CancelledRun
from prefect.runner._control_channel import ControlChannel

from flows.cli.run.job import cancellation_as_interrupt
from tests.support.cli_sandbox import CliSandbox, serve_prefect

JOB = """
import time
from prefect import flow
from prefect._internal.control_listener import configure_from_env  # as Prefect's engine does in a worker's process
from prefect.runtime import flow_run
from flows.runs import attempts

attempts.CANCEL_POLL_SECONDS = 0.2

@flow
@attempts.end_when_cancelled
def job(seconds: float) -> str:
    print(flow_run.id, flush=True)
    try:
        time.sleep(seconds)
    finally:
        time.sleep(2)
        print("saved", flush=True)
    return "done"

if __name__ == "__main__":
    configure_from_env()
    job(60, return_state=True)
"""


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve_prefect(tmp_path_factory.mktemp("prefect")) as url:
        yield url


def start(api: str, folder: Path, **variables: str) -> "tuple[subprocess.Popen[str], str]":
    """Start the job; return its process and flow run."""
    (folder / "job.py").write_text(JOB)
    environment = {**CliSandbox(folder, api).environment(), "PYTHONUNBUFFERED": "1", **variables}
    process = subprocess.Popen(
        [sys.executable, "job.py"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def set_state(api: str, run: str, kind: str) -> None:
    httpx.post(f"{api}/flow_runs/{run}/set_state", json={"state": {"type": kind}, "force": True}).raise_for_status()


def read_type(api: str, run: str) -> str:
    return str(httpx.get(f"{api}/flow_runs/{run}").raise_for_status().json()["state_type"])


@pytest.mark.parametrize("kind", ["CANCELLING", "CANCELLED"])
def test_a_run_that_nobody_else_ends_saves_and_is_cancelled(api: str, tmp_path: Path, kind: str) -> None:
    process, run = start(api, tmp_path)
    set_state(api, run, kind)
    shown, errors = process.communicate(timeout=50)
    assert shown.split() == ["saved"], errors
    assert process.returncode == 0, errors
    assert read_type(api, run) == "CANCELLED"
    assert "CRASHED" not in list_types(api, run)


def list_types(api: str, run: str) -> set[str]:
    found = httpx.get(f"{api}/flow_run_states/", params={"flow_run_id": run}).raise_for_status().json()
    return {state["type"] for state in found}


def test_a_workers_own_cancellation_is_understood_and_crashes_nothing(api: str, tmp_path: Path) -> None:
    """A run that were marked as crashed would be scheduled again."""

    async def cancel() -> tuple[str, str, str]:
        async with ControlChannel() as channel:
            attempt = uuid.uuid4()
            port, token = channel.register(attempt)
            variables = {"PREFECT__CONTROL_PORT": str(port), "PREFECT__CONTROL_TOKEN": token}
            process, run = await asyncio.to_thread(start, api, tmp_path, **variables)
            set_state(api, run, "CANCELLING")
            answer = await channel.signal(attempt, "cancel")
            process.terminate()
            shown, errors = await asyncio.to_thread(process.communicate, timeout=50)
            assert shown.split() == ["saved"], errors
            return answer.name, run, errors

    answer, run, errors = asyncio.run(cancel())
    assert answer == "ACKNOWLEDGED", errors
    assert "CRASHED" not in list_types(api, run)


def test_a_run_that_saves_already_is_not_interrupted_again(api: str, tmp_path: Path) -> None:
    """Its worker has sent the signal: saving takes longer than all looks at the server."""
    process, run = start(api, tmp_path)
    set_state(api, run, "CANCELLING")
    os.kill(process.pid, signal.SIGTERM)
    shown, errors = process.communicate(timeout=50)
    assert shown.split() == ["saved"], errors
    assert process.returncode != 0, "Prefect's, since no worker said what the signal means"


def test_any_other_state_leaves_a_run_alone(api: str, tmp_path: Path) -> None:
    process, run = start(api, tmp_path)
    set_state(api, run, "PAUSED")
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=4)
    process.kill()
    process.communicate()


def test_a_run_in_a_terminal_that_is_cancelled_on_the_server_ends_as_by_ctrl_c(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(KeyboardInterrupt), cancellation_as_interrupt():
        raise CancelledRun("cancelled")
    assert "cancelled on the Prefect server" in capsys.readouterr().err
