"""Start the training worker, monitor it, stop it gracefully, and trust only its result manifest."""

import contextlib
import fcntl
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tasks.diffusion.device import choose_device
from tasks.errors import AdapterSaveFailed, ArtifactCorrupt, ConfigError, StorageFull, TrainingFailed, TrainingStopped
from tasks.stage.digests import digest_file, dump_signed, load_lines, load_signed
from tasks.stage.files import quarantine, write_atomic
from tasks.stage.worker_process import GUARD, child_environment, guarded
from tasks.training.process.fork_server import ForkedWorker, kept_fork_server
from tasks.training.process.worker_spec import RunFolder, TrainingSpec, WorkerFailure, WorkerResult

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
PAUSE_SECONDS = 10.0  # that a sleep of `POLL_SECONDS` takes at most, unless this process was stopped
LOG_TAIL_BYTES = 16_384
LOCK_SECONDS = 10.0
KINDS = {kind.__name__: kind for kind in (ConfigError, StorageFull, AdapterSaveFailed)}
"""Errors of the worker that are raised here as they are; any other is a TrainingFailed that names the log."""
WORKER_MODULE = "tasks.training.process.worker"
WorkerProcess = subprocess.Popen[bytes] | ForkedWorker


def run_worker(
    spec: TrainingSpec,
    *,
    on_event: Callable[[dict[str, Any]], None],
    inherited: tuple[int, ...] = (),
    check: Callable[[], None] = lambda: None,
) -> WorkerResult:
    """Run the worker to its end and return the verified result.

    On any exception here, cancellation included, the worker first saves a checkpoint and exits. `check` is called
    several times a second and ends training by an exception.

    Raises:
        TrainingFailed: the worker ended without a result; names step and log.
        TrainingStopped: it saved on request and resumes in the next run.
        StorageFull: the disk is full.

    """
    run = RunFolder(spec.path)
    run.folder.mkdir(parents=True, exist_ok=True)
    result = read_result(run)
    if result is not None:  # an earlier run ended between the worker's result and the store
        return result
    write_atomic(run.spec, dump_signed(spec, indent=1))
    # Signals of the previous attempt: a stale stop file would end this one at its first step.
    run.stop.unlink(missing_ok=True)
    run.failure.unlink(missing_ok=True)
    run.events.write_text("")  # `EventTail` starts at 0 and must not replay an earlier attempt
    process = start(spec, run, inherited=inherited)
    tail = EventTail(run.events, on_event)
    heartbeats = Heartbeats(run, spec.training.world_size)
    try:
        while process.poll() is None:
            check()
            tail.read()
            rank = heartbeats.find_stalled(spec.training.stall_seconds)
            if rank is not None:  # the other ranks would wait for it in a collective indefinitely
                kill_all(process)
                raise TrainingFailed(
                    f"rank {rank} ran no forward pass for {spec.training.stall_seconds:.0f} s after step "
                    f"{tail.last_step}; all ranks were terminated; see {run.log}"
                )
            heartbeats.sleep(POLL_SECONDS)
    finally:
        if process.poll() is None:
            stop(process, run, grace_seconds=spec.training.grace_seconds)
    tail.read()  # what was appended between the last poll and the exit
    # The manifest decides, not the exit code: a worker that crashes while it shuts down has still succeeded.
    result = read_result(run)
    if result is not None:
        return result
    if tail.last_event == "stopped":
        raise TrainingStopped(f"training stopped at step {tail.last_step} and is saved; run again to resume")
    failure = read_failure(run)
    if failure is not None and failure.kind in KINDS:  # such as a full disk: it says what to do by itself
        raise KINDS[failure.kind](failure.message)
    reason = str(failure) if failure else find_root_cause(run.log) or describe_exit(process.wait())
    raise TrainingFailed(f"training ended at step {tail.last_step}: {reason}; see {run.log}")


def start(spec: TrainingSpec, run: RunFolder, *, inherited: tuple[int, ...] = ()) -> WorkerProcess:
    """Start one process per device in a new session.

    `inherited` file descriptors stay open in the child: it holds the run's lock until it exits.
    """
    # torchrun would set OMP_NUM_THREADS to 1 where it is unset.
    environment = child_environment(
        TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    )
    server = kept_fork_server.get()
    # The child holds a duplicate of the descriptor, so this one can be closed.
    with run.log.open("ab") as log:
        if server is not None and spec.training.world_size == 1 and choose_device(spec.diffusion).type == "cpu":
            forked = server.fork(run.spec, environment, [log.fileno(), *inherited])
            if forked is not None:
                return forked
        return subprocess.Popen(
            worker_command(spec, run),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the supervisor alone, which lets the worker save first
            pass_fds=inherited,
        )


def worker_command(spec: TrainingSpec, run: RunFolder) -> list[str]:
    """Return the command line of the worker, or of the launcher of one per device."""
    training = spec.training
    if training.world_size == 1:  # no rendezvous is needed; skipping torchrun saves seconds of start-up
        return guarded(WORKER_MODULE, str(run.spec))
    rdzv_args = ["--standalone"]
    if training.num_nodes > 1:
        rdzv_args = [
            "--nnodes", str(training.num_nodes), "--rdzv-backend", "c10d",
            "--rdzv-endpoint", training.rdzv_endpoint, "--rdzv-id", spec.stage_key,
        ]  # fmt: skip
    # Each rank runs under the guard and watches the supervisor itself: killing torchrun does not end its ranks.
    launcher = [*rdzv_args, "--nproc-per-node", str(training.num_devices), "-m", GUARD]
    return guarded("torch.distributed.run", *launcher, WORKER_MODULE, str(run.spec))


class Heartbeats:
    """When the ranks' heartbeat files last changed, by the monotonic clock.

    Their modification times are compared with each other only: while training runs, the clock may be set, and the
    machine may be suspended.
    """

    def __init__(self, run: RunFolder, world_size: int) -> None:
        self.paths = [run.heartbeat(rank) for rank in range(world_size)]
        self.seen = [(read_modified(path), time.monotonic()) for path in self.paths]

    def find_stalled(self, limit: float) -> int | None:
        """Return a rank whose file has not changed for `limit` seconds; None where there is none."""
        now = time.monotonic()
        for rank, path in enumerate(self.paths):
            found = read_modified(path)
            if found != self.seen[rank][0]:
                self.seen[rank] = (found, now)
        return next((rank for rank, (_, since) in enumerate(self.seen) if now - since > limit), None)

    def sleep(self, seconds: float) -> None:
        """Sleep; time in which this process was stopped (Ctrl-Z, SIGSTOP), maybe with all ranks, does not count."""
        begun = time.monotonic()
        time.sleep(seconds)
        pause = time.monotonic() - begun
        if pause > PAUSE_SECONDS:
            self.seen = [(modified, since + pause) for modified, since in self.seen]


def read_modified(path: Path) -> int | None:
    """Return a file's modification time in nanoseconds; None where there is no file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def stop(process: WorkerProcess, run: RunFolder, *, grace_seconds: float) -> None:
    """Request a checkpoint and exit, wait for the grace period, then kill all processes."""
    run.stop.touch()
    deadline = time.monotonic() + grace_seconds
    while process.poll() is None and time.monotonic() < deadline:
        # A second Ctrl-C must not cut off the save that the first one asked for.
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(POLL_SECONDS)
    if process.poll() is None:
        kill_all(process)


def kill_all(process: WorkerProcess) -> None:
    """Kill the launcher and every rank. torchrun gives each rank its own session, so a process group isn't enough."""
    if isinstance(process, ForkedWorker):  # the only rank
        process.kill()
        process.wait()
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        # Listed first: once the launcher is dead its children belong to init.
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
    process.wait()  # reaps the launcher


class EventTail:
    """Reads complete new lines of the worker's event file."""

    def __init__(self, path: Path, on_event: Callable[[dict[str, Any]], None]) -> None:
        self.path = path
        self.on_event = on_event
        self.position = 0
        self.last_step = 0
        self.last_event = ""

    def read(self) -> None:
        """Pass each event appended since the last call to `on_event`."""
        with self.path.open("rb") as file:
            file.seek(self.position)
            data = file.read()
        # The worker may be in the middle of a line: the rest waits for the next call.
        end = data.rfind(b"\n") + 1
        self.position += end
        for event in load_lines(data[:end]):
            if event is None:
                log.warning("an event of the training worker is damaged and skipped; see %s", self.path)
                continue
            self.last_step = int(event.get("step", self.last_step))
            self.last_event = str(event["event"])
            self.on_event(event)


def read_result(run: RunFolder) -> WorkerResult | None:
    """Return the result manifest if it and all files it names match their digests; else quarantine it, return None."""
    if not run.result.exists():
        return None
    try:
        result = load_signed(WorkerResult, run.result.read_bytes())
        for name, sha256 in result.files.items():
            if digest_file(run.folder / name) != sha256:
                raise ArtifactCorrupt(f"{name} differs from its digest")
    except (OSError, ArtifactCorrupt) as error:
        log.warning("the result of training is damaged (%s) and trained again; see %s", error, quarantine(run.result))
        return None
    return result


def read_failure(run: RunFolder) -> WorkerFailure | None:
    """Return the worker's failure report; None where it left none."""
    try:
        return load_signed(WorkerFailure, run.failure.read_bytes())
    except (OSError, ArtifactCorrupt):  # the exit code is described instead
        return None


def describe_exit(code: int) -> str:
    """Describe the exit of a worker that left no `failure.json`."""
    if code >= 0:  # `Popen.returncode` is negative where a signal ended the process
        return f"the worker exited with code {code} without a failure report"
    name = signal.Signals(-code).name
    hint = ", probably by the OOM killer" if -code == signal.SIGKILL else ""
    return f"the worker was killed by {name}{hint}"


def find_root_cause(log: Path) -> str | None:
    """Return which rank a signal ended first, as torchrun reports at the end of its log; None where none is named.

    It ends the other ranks at once, often before one of them has written a failure report.
    """
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        text = file.read().decode(errors="replace")
    found = re.search(r"Root Cause \(first observed failure\):.*?rank +: (\d+).*?exitcode +: -(\d+) ", text, re.DOTALL)
    if found is None:
        return None
    return f"rank {found[1]}: {describe_exit(-int(found[2]))}"


@contextmanager
def locked(path: Path, *, seconds: float = LOCK_SECONDS) -> Iterator[int]:
    """Hold an exclusive lock while this process, or one that inherited the file descriptor, is alive.

    Waits up to `seconds`: the orphaned worker of a killed run ends itself within a few seconds.

    Raises:
        TrainingFailed: another run holds the lock.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        deadline = time.monotonic() + seconds
        while True:
            try:
                # `flock` belongs to the open file, so the worker keeps it after a crash of the supervisor.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise TrainingFailed(
                        f"another run holds the training lock of this model; wait for it to end ({path})"
                    ) from error
                time.sleep(POLL_SECONDS)
        yield file.fileno()
