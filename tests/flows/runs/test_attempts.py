"""A run that crashes again and again is not rescheduled for ever, and no flow run is executed twice at once."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import psutil
import pytest
from prefect.exceptions import Abort
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from conf.request import RunRequest
from flows.runs.attempts import (
    MAX_ATTEMPTS,
    check_attempts,
    find_finished_attempt,
    leave_to_earlier_attempt,
    warn_of_clock,
)
from flows.runs.records import read_summary, write_request, write_start, write_summary
from tasks.errors import ConfigError, LikenessError
from tasks.manifests.run_summary import ProcessOwner
from tasks.services.store.lease import find_start, read_boot
from tests.support.http_server import serve


def test_a_run_that_crashed_too_often_fails_instead_of_being_rescheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "PREFECT__RUNTIME__FLOW_RUN__RUN_COUNT"  # Prefect's own way to set what `prefect.runtime` returns
    monkeypatch.setenv(variable, str(MAX_ATTEMPTS))
    check_attempts()
    monkeypatch.setenv(variable, str(MAX_ATTEMPTS + 1))
    with pytest.raises(LikenessError, match="the run crashed 5 times"):
        check_attempts()


@pytest.mark.parametrize(
    ("ahead", "warning"),
    [(0, None), (20, None), (600, "ahead of the Prefect server's"), (-600, "behind the Prefect server's")],
)
def test_a_clock_that_is_off_is_warned_of(ahead: float, warning: str | None, caplog: pytest.LogCaptureFixture) -> None:
    date = formatdate(time.time() - ahead, usegmt=True)
    with serve("true", date=date) as url, temporary_settings({PREFECT_API_URL: url}):
        warn_of_clock()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (warning is not None)
    assert (warning or "") in caplog.text


@pytest.mark.parametrize("date", ["yesterday", "Sun, 29 Nov 2026 11:00:00 -0000"])
def test_a_server_whose_time_is_unknown_costs_no_run(date: str, caplog: pytest.LogCaptureFixture) -> None:
    with serve("true", date=date) as url, temporary_settings({PREFECT_API_URL: url}):
        warn_of_clock()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        warn_of_clock()
    assert not caplog.records


def test_a_run_that_has_finished_is_not_done_again_when_it_is_rescheduled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = RunRequest(settings={"output_dir": str(tmp_path)})
    owner = ProcessOwner(host=socket.gethostname(), pid=os.getpid(), started=0)
    folder = make_attempt(tmp_path, "20260101-a", owner, flow_run_id="f1")
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "f1")
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__RUN_COUNT", "2")
    assert find_finished_attempt(request, is_trusted=True) is None
    write_summary(folder, read_summary(folder).model_copy(update={"status": "finished"}))
    found = find_finished_attempt(request, is_trusted=True)
    assert found is not None
    assert found.run_id == "20260101-a"
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "f2")
    assert find_finished_attempt(request, is_trusted=True) is None


def test_a_second_attempt_reads_no_file_that_a_restricted_request_may_not_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "elsewhere" / "token"
    secret.parent.mkdir()
    secret.write_text("hf_canary0123456789")
    monkeypatch.setenv("LIKENESS_ROOTS", str(tmp_path / "photos"))
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "f1")
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__RUN_COUNT", "2")
    request = RunRequest(settings={"evaluation.prompts": f"file:{secret}"})
    with pytest.raises(ConfigError) as caught:
        find_finished_attempt(request, is_trusted=False)
    assert "canary" not in str(caught.value)


@pytest.fixture
def earlier() -> Iterator[ProcessOwner]:
    """A process that started before the attempts of these tests."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = round(find_start(process.pid), 2)
    yield ProcessOwner(host=socket.gethostname(), pid=process.pid, started=started, boot=read_boot())
    process.kill()
    process.wait()


def make_attempt(output: Path, name: str, owner: ProcessOwner, *, flow_run_id: str = "f1") -> Path:
    folder = output / name
    folder.mkdir(parents=True)
    write_request(folder, RunRequest(), is_trusted=False)
    write_start(folder, name, flow_run_id=flow_run_id)
    write_summary(folder, read_summary(folder).model_copy(update={"owner": owner}))
    return folder


def later_than(owner: ProcessOwner) -> ProcessOwner:
    return owner.model_copy(update={"pid": os.getpid(), "started": owner.started + 60})


def test_a_second_process_of_a_flow_run_leaves_it_to_the_first_and_leaves_no_record(
    tmp_path: Path, earlier: ProcessOwner
) -> None:
    first = make_attempt(tmp_path, "20260101-a", earlier)
    second = make_attempt(tmp_path, "20260101-b", later_than(earlier))
    with pytest.raises(Abort, match=f"process {earlier.pid} executes this run already, as 20260101-a"):
        leave_to_earlier_attempt(second)
    assert not second.exists()
    assert read_summary(first).status == "running"


def test_an_attempt_goes_on_beside_later_other_ended_and_remote_ones(tmp_path: Path, earlier: ProcessOwner) -> None:
    own = make_attempt(tmp_path, "20260101-b", later_than(earlier))
    later = earlier.model_copy(update={"started": earlier.started + 1})  # within the slack: the same process
    for name, owner, flow_run_id in (
        ("20260101-c", earlier, "another flow run"),
        ("20260101-d", earlier.model_copy(update={"pid": 2**22 - 1}), "f1"),
        ("20260101-e", earlier.model_copy(update={"host": "elsewhere"}), "f1"),
    ):
        make_attempt(tmp_path, name, owner, flow_run_id=flow_run_id)
    leave_to_earlier_attempt(own)
    make_attempt(tmp_path, "20260101-f", later)
    leave_to_earlier_attempt(make_attempt(tmp_path, "20260101-0", earlier))


def test_a_suspended_process_does_not_keep_its_flow_run(tmp_path: Path, earlier: ProcessOwner) -> None:
    make_attempt(tmp_path, "20260101-a", earlier)
    own = make_attempt(tmp_path, "20260101-b", later_than(earlier))
    os.kill(earlier.pid, signal.SIGSTOP)
    while psutil.Process(earlier.pid).status() != psutil.STATUS_STOPPED:
        pass
    leave_to_earlier_attempt(own)
