"""Workers forked from a process that has done the imports: the same results, and nothing left behind."""

import errno
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.errors import TrainingFailed
from tasks.stage.digests import digest_file
from tasks.stage.worker_process import child_environment
from tasks.training.process import fork_server
from tasks.training.process.fork_server import (
    CRASHED_EXIT_CODE,
    GO,
    PID,
    ForkedWorker,
    ForkServer,
    keep_imports,
    kept_fork_server,
    receive,
)
from tasks.training.process.supervisor import locked, run_worker
from tasks.training.process.worker_spec import RunFolder, TrainingSpec
from tests.support.cli_sandbox import ROOT
from tests.support.tiny import DEVICE, make_spec

pytestmark = [
    pytest.mark.skipif(not fork_server.IS_SUPPORTED, reason="workers are forked on Linux alone"),
    pytest.mark.skipif(DEVICE != "cpu", reason="workers are forked where a CPU trains"),
]
STEPS = 4

SUPERVISOR = """
import sys
from pathlib import Path
from tasks.training.process import supervisor, worker
from tasks.training.process.fork_server import keep_imports, kept_fork_server

def show(event):
    print(kept_fork_server.get().process.pid, kept_fork_server.get().worker.pid, flush=True)

with keep_imports():
    supervisor.run_worker(worker.read_spec(Path(sys.argv[1])), on_event=show)
"""


def train(spec: TrainingSpec, folder: Path, **options: Any) -> RunFolder:
    spec = spec.model_copy(update={"folder": str(folder)})
    run_worker(spec, on_event=options.pop("on_event", lambda event: None), **options)
    return RunFolder(spec.path)


def kept() -> ForkServer:
    server = kept_fork_server.get()
    assert server is not None
    return server


def forked_pid() -> int:
    worker = kept().worker
    assert worker is not None
    return worker.pid


def digest_model(run: RunFolder) -> dict[str, str]:
    return {path.name: digest_file(path) for path in sorted(run.model.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> TrainingSpec:
    # Two threads: a fork of a process whose imports had used OpenMP's would wait for them for ever.
    return make_spec(tmp_path_factory.mktemp("spec"), tiny_model_folder, max_train_steps=STEPS, num_threads=2)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, spec: TrainingSpec) -> RunFolder:
    """What a worker trains that is started as a process of its own."""
    return train(spec, tmp_path_factory.mktemp("started") / "run")


@pytest.fixture(scope="module")
def keeping() -> Iterator[None]:
    """One server for the tests that leave it at work."""
    with keep_imports():
        yield


@pytest.mark.usefixtures("keeping")
def test_forked_workers_train_what_a_started_one_trains(tmp_path: Path, spec: TrainingSpec, started: RunFolder) -> None:
    runs, pids, servers = [], set(), set()
    for name in ("first", "second"):
        runs.append(train(spec, tmp_path / name))
        pids.add(forked_pid())
        assert kept().process is not None
        servers.add(kept().process.pid)  # type: ignore[union-attr]
    assert (len(pids), len(servers)) == (2, 1)
    for run in runs:
        assert digest_model(run) == digest_model(started)
        assert run.losses.read_bytes() == started.losses.read_bytes()
    assert all(not psutil.pid_exists(pid) for pid in pids)


@pytest.mark.usefixtures("keeping")
def test_a_forked_worker_says_in_its_log_and_report_why_it_failed(tmp_path: Path, spec: TrainingSpec) -> None:
    image = spec.instance_images[0].model_copy(update={"sha256": "0" * 64})
    broken = spec.model_copy(update={"instance_images": (image, *spec.instance_images[1:])})
    with pytest.raises(TrainingFailed, match="changed after it was checked"):
        train(broken, tmp_path / "run")
    assert "Traceback" in RunFolder(tmp_path / "run").log.read_text()


@pytest.mark.usefixtures("keeping")
def test_a_killed_worker_is_reported_and_the_next_one_resumes(
    tmp_path: Path, spec: TrainingSpec, started: RunFolder
) -> None:
    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            os.kill(forked_pid(), signal.SIGKILL)

    with pytest.raises(TrainingFailed, match="killed by SIGKILL"):
        train(spec, tmp_path / "run", on_event=kill)
    assert digest_model(train(spec, tmp_path / "run")) == digest_model(started)


@pytest.mark.usefixtures("keeping")
def test_a_forked_worker_holds_the_lock_that_it_inherits(tmp_path: Path, spec: TrainingSpec) -> None:
    path, seen = tmp_path / "lock", []

    def look(event: dict[str, Any]) -> None:
        files = {os.path.realpath(link) for link in Path(f"/proc/{forked_pid()}/fd").iterdir()}
        seen.append(str(path) in files)

    with locked(path) as descriptor:
        train(spec, tmp_path / "run", inherited=(descriptor,), on_event=look)
    assert seen[0]
    with path.open("a+") as file:  # neither worker nor server holds it
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.usefixtures("keeping")
def test_a_second_training_at_the_same_time_is_started_by_itself(
    tmp_path: Path, spec: TrainingSpec, started: RunFolder
) -> None:
    inner: list[RunFolder] = []

    def begin_another(event: dict[str, Any]) -> None:
        if event["event"] == "step" and not inner:
            first = forked_pid()
            os.kill(first, signal.SIGSTOP)  # still at work, however fast it is
            inner.append(train(spec, tmp_path / "other"))
            assert forked_pid() == first
            os.kill(first, signal.SIGCONT)

    run = train(spec, tmp_path / "run", on_event=begin_another)
    assert digest_model(run) == digest_model(inner[0]) == digest_model(started)


@pytest.mark.parametrize("change", ["killed", "environment"])
def test_a_server_that_was_killed_or_has_another_environment_is_replaced(change: str) -> None:
    server, environment = ForkServer(), child_environment()
    server.connect(environment)
    first = server.process
    assert first is not None
    if change == "killed":
        first.kill()
        first.wait()
    server.connect({**environment, **({"LIKENESS_TEST_OTHER": "1"} if change == "environment" else {})})
    second = server.process
    assert second not in (None, first)
    assert first.returncode is not None
    server.stop()
    assert second is not None
    assert second.returncode is not None


def request(server: ForkServer, log: Path) -> tuple[socket.socket, psutil.Process]:
    """Request a worker for a spec that isn't there, and return its socket and the process, which waits for its go."""
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, log.open("ab") as file:
        control = server.connect(child_environment())
        socket.send_fds(control, [os.fsencode(log.with_suffix(".json"))], [theirs.fileno(), file.fileno()])
    pid = receive(channel, PID, seconds=100)
    assert pid is not None
    return channel, psutil.Process(pid)


def test_workers_that_end_before_their_go_leave_the_server_as_it_was(
    tmp_path: Path, spec: TrainingSpec, started: RunFolder
) -> None:
    with keep_imports():
        given_up, worker = request(kept(), tmp_path / "log")
        given_up.close()
        killed, other = request(kept(), tmp_path / "log")
        killed.send(GO)  # which it may not have read
        other.kill()
        _, alive = psutil.wait_procs([worker, other], timeout=30)
        assert alive == []
        server = kept().process
        assert digest_model(train(spec, tmp_path / "run")) == digest_model(started)
        assert kept().process is server
        killed.close()


def test_a_server_that_is_stopped_holds_nobody_up(
    tmp_path: Path, spec: TrainingSpec, started: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: dict[str, Any]) -> None:
        assert kept().process is not None
        kept().process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]

    monkeypatch.setattr(fork_server, "REPORT_SECONDS", 0.5)
    with keep_imports():
        first = train(spec, tmp_path / "first", on_event=stop)  # it never hears how the worker ended
        monkeypatch.setattr(fork_server, "START_SECONDS", 0.5)
        second = train(spec, tmp_path / "second")
        assert kept().worker is None  # started otherwise
    assert digest_model(first) == digest_model(second) == digest_model(started)


def test_descriptors_above_1023_are_taken(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        channel, theirs = socket.socketpair()
        theirs.close()  # as of a server that has ended
        worker = ForkedWorker(child.pid, channel)
        assert worker.descriptor > 1023
        assert worker.poll() is None
        worker.kill()
        assert worker.wait() == CRASHED_EXIT_CODE
    finally:
        child.kill()
        child.wait()
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_pidfds_workers_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    before = kept_fork_server.get()
    with keep_imports():
        assert kept_fork_server.get() is before


def test_a_server_that_ends_while_it_trains_leaves_the_worker_to_its_end(
    tmp_path: Path, spec: TrainingSpec, started: RunFolder
) -> None:
    def kill(event: dict[str, Any]) -> None:
        process = kept().process
        assert process is not None
        process.kill()

    with keep_imports():
        assert digest_model(train(spec, tmp_path / "run", on_event=kill)) == digest_model(started)


def test_without_a_server_that_can_import_workers_are_started(
    tmp_path: Path, spec: TrainingSpec, started: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "guarded", lambda module: [sys.executable, "-c", "raise ImportError"])
    with keep_imports():
        assert digest_model(train(spec, tmp_path / "run")) == digest_model(started)
        assert kept().worker is None


def test_a_request_that_is_interrupted_during_the_imports_forks_no_worker(
    tmp_path: Path, spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(channel: object, request: list[bytes], descriptors: list[int]) -> None:
        send(channel, request, descriptors)
        raise KeyboardInterrupt

    send = fork_server.socket.send_fds
    monkeypatch.setattr(fork_server.socket, "send_fds", interrupt)
    with keep_imports():
        server = kept()
        with pytest.raises(KeyboardInterrupt):
            train(spec, tmp_path / "run")
        assert server.process is None
    assert not RunFolder(tmp_path / "run").losses.exists()


def test_server_and_worker_end_with_a_killed_supervisor(tmp_path: Path, spec: TrainingSpec) -> None:
    longer = spec.training.model_copy(update={"max_train_steps": 100_000})
    spec = spec.model_copy(update={"training": longer, "folder": str(tmp_path / "run")})
    from tasks.training.process.worker import write_spec

    write_spec(tmp_path / "spec.json", spec)
    command = [sys.executable, "-c", SUPERVISOR, str(tmp_path / "spec.json")]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    processes = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(processes) == 2
    assert all(process.is_running() for process in processes)
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []
