"""A folder in which tests type commands as a person would."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.runs.records import list_summaries

ROOT = Path(__file__).resolve().parents[2]
LIKENESS = [sys.executable, "-m", "flows.cli.main"]
QUICK = ["experiment=smoke", "training.num_threads=1"]


@dataclass(frozen=True)
class CliSandbox:
    """A folder to run in, with a Prefect home of its own.

    Without `server_url` every command starts the embedded Prefect server.
    """

    folder: Path
    server_url: str | None = None

    def embedded(self) -> "CliSandbox":
        return replace(self, server_url=None)

    @property
    def output(self) -> Path:
        return self.folder / "runs"

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        return {
            **kept,
            "PREFECT_HOME": str(self.folder / ("prefect" if self.server_url else "prefect embedded")),
            **({"PREFECT_API_URL": self.server_url} if self.server_url else {}),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "LIKENESS_ROOTS": str(self.folder),
        }

    def likeness(self, *words: str, timeout: float = 280, typed: str = "") -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*LIKENESS, *words], cwd=self.folder, env=self.environment(),
            capture_output=True, text=True, timeout=timeout, check=False, input=typed,
        )  # fmt: skip

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*LIKENESS, "run", *QUICK, *words], cwd=self.folder, env=self.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return self.likeness("run", *QUICK, *words)

    def run_first(self) -> dict[str, Any]:
        """Run the quick demo and return its summary."""
        done = self.run()
        assert done.returncode == 0, done.stderr[-3000:]
        return self.newest()

    def newest(self) -> dict[str, Any]:
        return list_summaries(self.output)[0].model_dump(mode="json", exclude_unset=True)


def end(process: "subprocess.Popen[bytes]", *, seconds: float = 45) -> None:
    """Ask a process to end, and make it where it takes too long."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def serve_prefect(folder: Path, *, port: int = 0, variables: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run a Prefect server on a loopback port, by default a free one, and yield its API's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = port or probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "prefect-server.log").open("wb") as log:
        environment = CliSandbox(folder, url).environment() | dict(variables or {})
        # Tests wait for events, which the server else stores every five seconds.
        environment["PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL"] = "0.2"
        environment["PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS"] = "0.5"  # how often it looks for lost workers
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, (folder / "prefect-server.log").read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline, "the Prefect server did not start"
                time.sleep(0.2)
        yield url
    finally:
        drain()
        end(process)


def drain() -> None:
    """Send what threads of this process have for a server: later they would try in vain, and so end it minutes late.

    Prefect keeps them with their first server; those of the next one start anew.
    """
    if worker := sys.modules.get("prefect.events.worker"):
        worker.EventsWorker.drain_all(timeout=10, at_exit=False)


@contextmanager
def make_sandbox(parent: Path) -> Iterator[CliSandbox]:
    """Yield a folder with a space in its name, and a running Prefect server."""
    folder = parent / "a place"
    folder.mkdir()
    with serve_prefect(folder) as url:
        yield CliSandbox(folder, url)
