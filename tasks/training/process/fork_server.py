"""A process that imports the training worker once and forks a worker for every training.

    python -m tasks.training.process.fork_server    # requests on standard input, a Unix socket

The worker's imports take longer than a small model's training. Used only where one CPU trains: the driver's state
of a GPU does not survive a fork.
"""

import contextlib
import contextvars
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tasks.stage.guard import start_watcher
from tasks.stage.worker_process import guarded

MAX_REQUEST_BYTES = 65_536
MAX_DESCRIPTORS = 64
IS_SUPPORTED = sys.platform == "linux"  # pidfds; on macOS, frameworks that torch links to forbid forks
CRASHED_EXIT_CODE = 1
GO = b"go"


class ForkedWorker:
    """A worker forked by a server: what the supervisor uses of `subprocess.Popen`."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.channel = channel
        self.descriptor = os.pidfd_open(pid)  # unlike a pid, it never names another process

    def poll(self) -> int | None:
        """Return the exit code; None while the process runs."""
        if self.returncode is None and select.select([self.descriptor], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Wait for the process to end and return its exit code."""
        if self.returncode is None:
            select.select([self.descriptor], [], [])
            os.close(self.descriptor)
            self.returncode = self.read_exit_code()
        return self.returncode

    def read_exit_code(self) -> int:
        """Return what the server reports; CRASHED_EXIT_CODE where the server has ended too."""
        try:
            return int(self.channel.recv(MAX_REQUEST_BYTES) or CRASHED_EXIT_CODE)
        except OSError:
            return CRASHED_EXIT_CODE

    def kill(self) -> None:
        """Send SIGKILL."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.descriptor, signal.SIGKILL)


class ForkServer:
    """The server's process; started on first use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: socket.socket | None = None
        self.environment: dict[str, str] = {}
        self.worker: ForkedWorker | None = None

    def fork(self, spec: Path, environment: dict[str, str], descriptors: Sequence[int]) -> ForkedWorker | None:
        """Fork a worker for a spec; None where it has to be started otherwise.

        The first descriptor becomes its standard output and error; it inherits the others. A server with another
        environment is replaced: torch and OpenMP read theirs when they are loaded.
        """
        with self.lock:
            if self.worker is not None and self.worker.poll() is None:  # one at a time
                return None
            try:
                channel = self.connect(environment)
                socket.send_fds(channel, [os.fsencode(spec)], descriptors)
                reply = channel.recv(MAX_REQUEST_BYTES)
                if not reply:  # it failed in its imports, or was killed
                    self.stop()
                    return None
                self.worker = ForkedWorker(int(reply), channel)
                channel.send(GO)
            except OSError:
                self.stop()
                return None
            except BaseException:  # Ctrl-C while it imports: the worker that it may fork yet is never let go
                self.stop()
                raise
            return self.worker

    def connect(self, environment: dict[str, str]) -> socket.socket:
        """Return the channel to a running server with this environment, started if needed."""
        if self.process is not None and (self.process.poll() is not None or self.environment != environment):
            self.stop()
        if self.channel is None:
            self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.environment = environment
            with theirs:
                self.process = subprocess.Popen(
                    guarded("tasks.training.process.fork_server"),
                    stdin=theirs.fileno(),
                    # A failed import is reported by the worker that is then started otherwise.
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=self.environment,
                    start_new_session=True,  # Ctrl-C reaches the supervisor alone
                )
        return self.channel

    def stop(self) -> None:
        """End the server. A worker that is at work stays; one that waits for its go ends."""
        if self.channel is not None:
            self.channel.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = self.channel = None


kept_fork_server: contextvars.ContextVar[ForkServer | None] = contextvars.ContextVar("fork_server", default=None)


@contextmanager
def keep_imports() -> Iterator[None]:
    """Fork the workers of all trainings in this process from one that has done the imports."""
    if not IS_SUPPORTED:
        yield
        return
    server = ForkServer()
    token = kept_fork_server.set(server)
    try:
        yield
    finally:
        kept_fork_server.reset(token)
        server.stop()


def serve(channel: socket.socket) -> str | None:
    """Fork a worker per request. Returns twice: the spec's path in each worker, None once the supervisor is gone."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(channel, MAX_REQUEST_BYTES, MAX_DESCRIPTORS)
        if not request:
            return None
        pid = os.fork()
        if pid == 0:
            return become_worker(channel, request, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        # Not delivered if the supervisor is gone: the next request is then empty.
        with contextlib.suppress(BrokenPipeError):
            channel.send(str(os.waitstatus_to_exitcode(status)).encode())


def become_worker(channel: socket.socket, request: bytes, descriptors: Sequence[int]) -> str | None:
    """Make this fork what a started worker is. Returns the spec's path, None if the supervisor gave it up."""
    os.setsid()
    log = descriptors[0]
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    channel.send(str(os.getpid()).encode())
    is_wanted = channel.recv(MAX_REQUEST_BYTES) == GO
    # Both of its descriptors: the supervisor finds the server's end closed once the server has ended.
    channel.close()
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    if not is_wanted:
        return None
    start_watcher()
    os.write(1, f"forked by process {os.getppid()}, which has done the imports\n".encode())
    return os.fsdecode(request)


def main() -> int:
    """Serve until the supervisor is gone; in a fork, train."""
    from tasks.training.process import worker

    # Python 3.12 and later warn of forks beside threads: OpenBLAS stops its own before a fork, the watcher only waits.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    gc.freeze()  # collections in a fork would copy the pages of all imported objects
    with socket.socket(fileno=os.dup(0)) as channel:
        spec = serve(channel)
    return worker.main([spec]) if spec else 0


if __name__ == "__main__":
    sys.exit(main())
