"""An embedded Prefect server where none is configured: started early, stopped with the process."""

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from flows.cli.stack.stack import find_api_url
from tasks.errors import ConfigError, ServiceUnavailable
from tasks.stage.worker_process import child_environment, guarded

START_SECONDS, TURN_SECONDS = 120.0, 600.0
NOTICE_SECONDS, POLL_SECONDS = 5.0, 0.1
MAX_LOG_BYTES = 1_000_000
WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
VARIABLES = ("PREFECT_HOME", "PREFECT_API_URL", "PREFECT_LOGGING_TO_API_ENABLED", "LIKENESS_EMBEDDED_SERVER")
"""What `start` sets, for this process and those that it starts."""
# The embedded server only keeps this run's states; everything else would slow its start.
SERVER_ENVIRONMENT = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "0",
    "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
}


class EmbeddedServer:
    """Prefect's API in a process of its own on a free loopback port."""

    def __init__(self, output: Path) -> None:
        # A home of its own: the user's Prefect database may belong to another version.
        self.home = Path(os.environ.get("PREFECT_HOME") or output.absolute() / ".prefect")
        self.log = self.home / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.wait_seconds = 0.0
        self._has_answered, self._reason = False, ""
        self._is_stopped = threading.Event()
        self._starter = threading.Thread(target=self._start_in_turn, name="prefect-server", daemon=True)

    def start(self) -> None:
        """Begin to start the server, without waiting; it ends with this process."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {self.home}: {error.strerror}; set output_dir") from error
        # Bound here and inherited by the server, so that no other process can take the port meanwhile.
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/api"
        # For this process and the server alike. Prefect reads both variables when it is imported, which happens later.
        os.environ["PREFECT_HOME"] = str(self.home)
        os.environ["PREFECT_API_URL"] = self.url
        # It ends with the run, often before the last log lines are sent.
        os.environ.setdefault("PREFECT_LOGGING_TO_API_ENABLED", "false")
        os.environ.setdefault("LIKENESS_EMBEDDED_SERVER", "1")
        self._starter.start()

    def wait(self) -> None:
        """Wait until the server answers, and record the time waited. Raises ServiceUnavailable."""
        started = time.monotonic()
        self._starter.join(NOTICE_SECONDS)
        if self._starter.is_alive() and self.process is None:
            print("waiting for the Prefect server of another run to start", file=sys.stderr)
        self._starter.join()
        self.wait_seconds = time.monotonic() - started
        if not self._has_answered:
            raise ServiceUnavailable(f"the embedded Prefect server did not start{self._reason}; see {self.log}")

    def stop(self) -> None:
        """Stop the server."""
        self._is_stopped.set()
        if self._starter.ident is not None:
            self._starter.join()
        self._end()

    def _start_in_turn(self) -> None:
        # Servers that migrate one new database at once fail (prefect 3.8.8): one after the other.
        with self._socket, (self.home / "server.lock").open("a") as lock:
            deadline = time.monotonic() + TURN_SECONDS
            while not take(lock):
                if self._is_stopped.wait(POLL_SECONDS) or time.monotonic() > deadline:
                    return
            try:
                self._launch()
                self._has_answered = self._poll()
            except OSError as error:  # no space for the log, no process
                self._reason = f": {error}"
            finally:
                if not self._has_answered:
                    self._end()

    def _launch(self) -> None:
        command = guarded(
            "uvicorn", "--factory", "prefect.server.api.server:create_app",
            "--fd", str(self._socket.fileno()), "--log-level", "error", "--lifespan", "on",
        )  # fmt: skip
        environment = child_environment(**SERVER_ENVIRONMENT)
        is_large = self.log.exists() and self.log.stat().st_size > MAX_LOG_BYTES
        with self.log.open("wb" if is_large else "ab") as log:  # other runs' servers write to it too
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=(self._socket.fileno(),),
                start_new_session=True,  # keeps Ctrl-C from the server, which the run needs to report its final state
            )

    def _poll(self) -> bool:
        """Whether the server answers in time."""
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with WITHOUT_PROXY.open(f"{self.url}/health", timeout=5):
                    return True
            except OSError:  # URLError is one
                if self._is_stopped.wait(POLL_SECONDS):
                    break
        return False

    def _end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextlib.contextmanager
def shared_server(output: Path) -> Iterator[None]:
    """Run one embedded server for all commands that this process starts, where none is configured and no stack runs.

    Raises:
        ServiceUnavailable: it did not start.

    """
    if not needs_server() or find_api_url(output.absolute()):
        yield
        return
    before = {name: os.environ.get(name) for name in VARIABLES}
    server = EmbeddedServer(output)
    server.start()
    try:
        server.wait()
        yield
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def take(lock: IO[str]) -> bool:
    """Whether an exclusive lock was free."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def needs_server() -> bool:
    """Whether no Prefect server is configured, in the environment or in the active profile."""
    if os.environ.get("PREFECT_API_URL"):
        return False
    # Read without importing Prefect, which takes over a second.
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    try:
        profiles = tomllib.loads((home / "profiles.toml").read_text())
    except (OSError, ValueError):
        return True
    name = os.environ.get("PREFECT_PROFILE") or profiles.get("active", "")
    return not profiles.get("profiles", {}).get(name, {}).get("PREFECT_API_URL")
