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
# On macOS, frameworks that torch links to forbid forks; some builds of Python for Linux lack pidfds.
IS_SUPPORTED = sys.platform == "linux" and hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal")
START_SECONDS = 120.0
"""For the imports; then the worker is started otherwise."""
REPORT_SECONDS = 5.0
"""From a worker's end to the server's report of it."""
CRASHED_EXIT_CODE = 1
PID, EXIT, GO = b"pid", b"exit", b"go"
"""What is sent over a request's own socket: by the worker, by the server, and to the worker."""


class ForkedWorker:
    """A worker forked by a server: what the supervisor uses of `subprocess.Popen`."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.channel = channel
        self.descriptor = os.pidfd_open(pid)  # unlike a pid, it never names another process

    def poll(self) -> int | None:
        """Return the exit code; None while the process runs."""
        return self.wait() if self.returncode is not None or self.has_ended(0) else None

    def wait(self) -> int:
        """Wait for the process to end and return its exit code."""
        if self.returncode is None:
            self.has_ended(None)
            self.returncode = self.read_exit_code()
            os.close(self.descriptor)
        return self.returncode

    def has_ended(self, milliseconds: int | None) -> bool:
        """Wait for the process to end, for ever with None, and return whether it has."""
        poll = select.poll()  # unlike `select`, it takes descriptors above 1023
        poll.register(self.descriptor, select.POLLIN)
        return bool(poll.poll(milliseconds))

    def read_exit_code(self) -> int:
        """Return what the server reports; CRASHED_EXIT_CODE where the server has ended too, or is stopped."""
        with self.channel:
            return int(receive(self.channel, EXIT, seconds=REPORT_SECONDS) or CRASHED_EXIT_CODE)

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
        self.control: socket.socket | None = None
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
                self.worker = self.request(spec, environment, descriptors)
            except OSError:
                self.worker = None
            except BaseException:  # Ctrl-C while it imports: the worker that it may fork yet is never let go
                self.stop()
                raise
            if self.worker is None:  # it failed in its imports, is stopped, or was killed
                self.stop()
            return self.worker

    def request(self, spec: Path, environment: dict[str, str], descriptors: Sequence[int]) -> ForkedWorker | None:
        """Request a worker over a socket of its own; None where none was forked."""
        control = self.connect(environment)
        channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        worker: ForkedWorker | None = None
        try:
            with theirs:
                socket.send_fds(control, [os.fsencode(spec)], [theirs.fileno(), *descriptors])
            pid = receive(channel, PID, seconds=START_SECONDS)
            if pid is None:
                channel.close()
                return None
            worker = ForkedWorker(pid, channel)
            channel.send(GO)
        except BaseException:
            channel.close()  # a worker without its go ends
            if worker is not None:
                worker.kill()
            raise
        return worker

    def connect(self, environment: dict[str, str]) -> socket.socket:
        """Return the socket of a running server with this environment, started if needed."""
        if self.process is not None and (self.process.poll() is not None or self.environment != environment):
            self.stop()
        if self.control is None:
            self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
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
        return self.control

    def stop(self) -> None:
        """End the server. A worker that is at work stays; one that waits for its go ends."""
        if self.control is not None:
            self.control.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = self.control = None


def has_pidfds() -> bool:
    """Whether Python and the kernel have them; sandboxes may forbid the call."""
    if not IS_SUPPORTED:
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


kept_fork_server: contextvars.ContextVar[ForkServer | None] = contextvars.ContextVar("fork_server", default=None)


@contextmanager
def keep_imports() -> Iterator[None]:
    """Fork the workers of all trainings in this process from one that has done the imports."""
    if not has_pidfds():
        yield
        return
    server = ForkServer()
    token = kept_fork_server.set(server)
    try:
        yield
    finally:
        kept_fork_server.reset(token)
        server.stop()


def receive(channel: socket.socket, kind: bytes, *, seconds: float) -> int | None:
    """Return the number in the next message; None where it is of another kind, or none comes."""
    channel.settimeout(seconds)
    try:
        found, _, number = channel.recv(MAX_REQUEST_BYTES).partition(b" ")
    except OSError:  # a timeout among them
        return None
    return int(number) if found == kind else None


def serve(control: socket.socket) -> str | None:
    """Fork a worker per request. Returns twice: the spec's path in each worker, None once the supervisor is gone."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, MAX_DESCRIPTORS)
        if not request:
            return None
        # A socket for each request: what a worker left unread when it was killed belongs to no other.
        with socket.socket(fileno=descriptors.pop(0)) as channel:
            pid = os.fork()
            if pid == 0:
                control.close()
                return become_worker(channel, request, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            _, status = os.waitpid(pid, 0)
            with contextlib.suppress(OSError):  # the supervisor may be gone, or have given this worker up
                channel.send(EXIT + b" %d" % os.waitstatus_to_exitcode(status))


def become_worker(channel: socket.socket, request: bytes, descriptors: Sequence[int]) -> str | None:
    """Make this fork what a started worker is. Returns the spec's path, None if the supervisor gave it up."""
    os.setsid()
    log = descriptors[0]
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    channel.send(PID + b" %d" % os.getpid())
    is_wanted = channel.recv(MAX_REQUEST_BYTES) == GO
    channel.close()  # so that the supervisor finds it closed once the server has ended
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
    with socket.socket(fileno=os.dup(0)) as control:
        spec = serve(control)
    return worker.main([spec]) if spec else 0


if __name__ == "__main__":
    sys.exit(main())
