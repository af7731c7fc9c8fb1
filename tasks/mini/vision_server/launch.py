"""Start the mini vision server as a child process of a run."""

import contextvars
import queue
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.errors import ServiceUnavailable
from tasks.stage.worker_process import child_environment, guarded

START_SECONDS = 120.0


class LocalServer:
    """The server's process; started on first use."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[str] | None = None
        self.base_url = ""
        self.lock = threading.Lock()

    def start(self) -> str:
        """Return the server's address, starting it if it isn't running. Raises ServiceUnavailable."""
        with self.lock:
            if self.process is not None and self.process.poll() is None:  # a server that has died is started again
                return self.base_url
            command, environment = guarded("tasks.mini.vision_server"), child_environment(OMP_NUM_THREADS="1")
            self.log.parent.mkdir(parents=True, exist_ok=True)
            # A session of its own, so that Ctrl-C in a terminal interrupts the run alone, which then stops the server.
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, start_new_session=True
                )
            self.base_url = self.read_address(self.process)
            return self.base_url

    def read_address(self, process: "subprocess.Popen[str]") -> str:
        """Return the address that the server prints once it listens. Raises ServiceUnavailable."""
        # A thread, since `readline` has no timeout: a server that hangs in its imports prints nothing.
        lines: queue.Queue[str] = queue.Queue()
        pipe = process.stdout
        assert pipe is not None
        threading.Thread(target=lambda: lines.put(pipe.readline()), daemon=True).start()
        try:
            address = lines.get(timeout=START_SECONDS).strip()
        except queue.Empty:
            address = ""
        if not address.startswith("http"):
            self.stop()
            raise ServiceUnavailable(f"the mini vision server did not start; see {self.log}")
        return address

    def release(self) -> None:
        """Stop the server, unless it is kept for further runs of this process."""
        if kept_server.get() is not self:
            self.stop()

    def stop(self) -> None:
        """Terminate the server, and kill it after 10 s."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()


kept_server: contextvars.ContextVar[LocalServer | None] = contextvars.ContextVar("vision_server", default=None)


@contextmanager
def keep_server(log: Path) -> Iterator[None]:
    """Use one server for all runs in this process: each would take seconds to load its models."""
    server = LocalServer(log)
    token = kept_server.set(server)
    try:
        yield
    finally:
        kept_server.reset(token)
        server.stop()


def find_server(log: Path) -> LocalServer:
    """Return the kept server, or a new one with its own log; to be given back by `release`."""
    return kept_server.get() or LocalServer(log)
