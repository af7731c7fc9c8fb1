"""An embedded Prefect server where none is configured: started early, stopped with the process."""

import contextlib
import fcntl
import os
import socket
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.stage.worker_process import child_environment, guarded

START_SECONDS = 120.0
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
        self.started = contextlib.ExitStack()
        """What is held until the server answers or is stopped."""

    def start(self) -> None:
        """Start the server without waiting for its answer; it ends with this process."""
        # The port is free again once the probe closes. Another process could take it in between;
        # the server then fails to bind and `wait` reports its log.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = guarded(
            "uvicorn", "--factory", "prefect.server.api.server:create_app",
            "--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error", "--lifespan", "on",
        )  # fmt: skip
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {self.home}: {error.strerror}; set output_dir") from error
        # For this process and the server alike. Prefect reads both variables when it is imported, which happens later.
        os.environ["PREFECT_HOME"] = str(self.home)
        # Servers that migrate one new database at once fail: one after the other, until each answers (prefect 3.8.8).
        lock = self.started.enter_context((self.home / "server.lock").open("a"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = child_environment(**SERVER_ENVIRONMENT)
        with self.log.open("ab") as log:  # other runs' servers write to it too
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # keeps Ctrl-C from the server, which the run needs to report its final state
            )
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{self.port}/api"

    def wait(self) -> None:
        """Wait until the server answers, and record the time waited. Raises ServiceUnavailable."""
        with self.started:
            self._wait()

    def _wait(self) -> None:
        started = time.monotonic()
        url = f"http://127.0.0.1:{self.port}/api/health"
        assert self.process is not None
        while time.monotonic() - started < START_SECONDS and self.process.poll() is None:
            try:
                with urllib.request.urlopen(url, timeout=5):
                    self.wait_seconds = time.monotonic() - started
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise ServiceUnavailable(f"the embedded Prefect server did not start; see {self.log}")

    def stop(self) -> None:
        """Stop the server."""
        self.started.close()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


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
