"""Processes of the local stack: found again, stopped with all below them, never confused with others."""

import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.cli.stack.processes import StackProcess, check_port, has_not_ended, start_detached, stop, wait_healthy
from flows.cli.stack.stack import MLFLOW, PREFECT, StackOptions, find_api_url, read_state, start_servers, write_state
from flows.cli.stack.submit import make_request, submit
from tasks.errors import ConfigError, ServiceUnavailable

SLEEPER = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "


def start(tmp_path: Path, code: str = "import time; time.sleep(600)", *, port: int = 0) -> StackProcess:
    command = [sys.executable, "-c", code]
    return start_detached(PREFECT, command, log=tmp_path / "log", environment={}, port=port)


def test_a_process_is_stopped_with_all_processes_below_it(tmp_path: Path) -> None:
    process = start(tmp_path, SLEEPER + "print('started', flush=True); time.sleep(600)")
    deadline = time.monotonic() + 60
    while "started" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    [child] = psutil.Process(process.pid).children(recursive=True)
    assert process.is_alive()
    assert stop(process, seconds=20)
    assert not process.is_alive()
    assert not has_not_ended(child)
    assert not stop(process)


def test_a_reused_pid_is_not_stopped(tmp_path: Path) -> None:
    process = start(tmp_path)
    other = process.model_copy(update={"started": process.started - 100})
    assert not other.is_alive()
    assert not stop(other)
    assert process.is_alive()
    stop(process, seconds=20)


def test_a_port_in_use_is_a_one_line_error_naming_the_option(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use .* choose one with --mlflow-port"):
            start_servers(StackOptions(tmp_path, 0, port, 0))
    assert read_state(tmp_path).processes == ()  # nothing was started


def test_a_process_that_ends_while_it_starts_is_an_error_with_the_last_line_of_its_log(tmp_path: Path) -> None:
    process = start(tmp_path, "print('no database'); raise SystemExit(3)")
    with pytest.raises(ServiceUnavailable, match=r"Prefect server ended while it started: no database; see .*log"):
        wait_healthy(process, lambda: False, seconds=60)


def test_the_api_of_a_running_stack_is_found_and_that_of_an_ended_one_is_not(tmp_path: Path) -> None:
    assert find_api_url(tmp_path) == ""
    process = start(tmp_path, port=4321)
    write_state(StackOptions(tmp_path, 0, 0, 0), process)
    assert find_api_url(tmp_path) == "http://127.0.0.1:4321/api"
    assert read_state(tmp_path).find(MLFLOW) is None
    stop(process, seconds=20)
    assert find_api_url(tmp_path) == ""


def test_a_damaged_state_file_is_an_error_and_hides_no_api(tmp_path: Path) -> None:
    (tmp_path / "stack").mkdir()
    (tmp_path / "stack" / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"state.json: .*stop the processes by hand and delete it"):
        read_state(tmp_path)
    assert find_api_url(tmp_path) == ""


def test_a_port_of_zero_is_any_free_one() -> None:
    assert check_port(0, option="--prefect-port") > 0


def test_submit_without_a_stack_is_an_error_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ConfigError, match="`likeness up` starts one"):
        submit(["experiment=smoke"], tmp_path, is_detached=True)


def test_an_invalid_setting_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.max_train_steps"):
        submit(["training.max_train_steps=-1"], tmp_path, is_detached=True)


def test_a_submitted_request_has_absolute_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = make_request(["subject.source=photos", "subject.class_noun=dog"], tmp_path / "runs")
    assert request.settings["subject.source"] == str(tmp_path / "photos")
    assert request.settings["output_dir"] == str(tmp_path / "runs")
    assert "subject.source" not in make_request([], tmp_path / "runs").settings
