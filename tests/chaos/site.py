"""The site of a campaign: a local stack, a bucket and a vision server behind fault-injecting proxies."""

import logging
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from flows.cli.stack.processes import StackProcess, start_detached, stop
from flows.cli.stack.stack import MLFLOW, POOL, PREFECT, WORKER, StackOptions, prefect_environment, read_state
from tasks.services.store.base import Store
from tasks.services.store.local import LocalStore
from tests.chaos.processes import MARKER
from tests.support.cli_sandbox import LIKENESS, ROOT
from tests.support.fault_proxy import FaultProxy
from tests.support.prefect_api import QUICK_HEARTBEATS, create_flow_run, open_api

BUCKET = "chaos"
SETTINGS = (
    "experiment=smoke",
    "training.num_threads=1",
    "training.checkpointing_steps=3",
)


@dataclass(frozen=True)
class Place:
    """A store of its own for some runs, with an LLM account of its own."""

    name: str
    kind: str
    """s3: a bucket and a vision server behind proxies; local: a folder, and a vision server of each run's own."""
    folder: Path
    num_steps: int
    """Of training."""
    llm: FaultProxy | None = None

    def settings(self, seed: int) -> list[str]:
        """Return the settings of a run here."""
        words = [*SETTINGS, f"training.max_train_steps={self.num_steps}", f"output_dir={self.folder}", f"seed={seed}"]
        return words if self.kind == "local" else [*words, f"store={self.name}", f"llm={self.name}"]


@dataclass(frozen=True)
class WallClock:
    """A wall clock that can be set for some processes alone, while they run (`clock_step.c`)."""

    folder: Path

    def build(self) -> None:
        """Compile the library; without a C compiler the clock can't be set."""
        self.folder.mkdir(parents=True, exist_ok=True)
        compiler = shutil.which("cc")
        if compiler:
            source = Path(__file__).parent / "clock_step.c"
            words = [compiler, "-shared", "-fPIC", "-O2", "-o", str(self.folder / "clock_step.so"), str(source), "-ldl"]
            subprocess.run(words, check=True)
            self.set(0)

    def environment(self) -> dict[str, str]:
        """Return the variables of the processes that read it; none where it can't be set."""
        if not (self.folder / "offset").exists():
            return {}
        return {
            "LD_PRELOAD": str(self.folder / "clock_step.so"),
            "LIKENESS_CHAOS_CLOCK": str(self.folder / "offset"),
        }

    def set(self, seconds: int) -> None:
        """Set it to so many seconds after the true time."""
        path = self.folder / "offset"
        with path.open("r+b" if path.exists() else "w+b") as file:  # in place: processes have mapped it
            file.write((seconds * 10**9).to_bytes(8, sys.byteorder, signed=True))

    def read(self) -> int:
        """Return by how many seconds it is ahead."""
        return int.from_bytes((self.folder / "offset").read_bytes(), sys.byteorder, signed=True) // 10**9


@dataclass
class Site:
    """Everything that runs during a campaign."""

    root: Path
    num_workers: int
    num_steps: int
    patience: float
    """Seconds for which a fault waits for a process or a lease that it could hit."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    places: dict[str, Place] = field(default_factory=dict)
    workers: list[StackProcess] = field(default_factory=list)
    """Beside the stack's own."""
    vision: "subprocess.Popen[str] | None" = None
    vision_port: int = 0
    bucket_url: str = ""
    bucket: FaultProxy | None = None

    @property
    def clock(self) -> "WallClock":
        """That of the workers beside the stack's own, and of their runs: another machine's."""
        return WallClock(self.root / "clock")

    @property
    def output(self) -> Path:
        """The stack's output folder."""
        return self.root / "runs"

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "LIKENESS_"))}
        return {**kept, **self.changes()}

    def changes(self) -> dict[str, str]:
        """Return the variables that all processes of the campaign inherit."""
        return {
            MARKER: self.token,
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.root / "tmp"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "LIKENESS_ROOTS": str(self.root),
            "LIKENESS_CONF": str(self.root / "conf"),
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **QUICK_HEARTBEATS,
            "PREFECT_WORKER_QUERY_SECONDS": "2",
        }

    def likeness(self, *words: str, seconds: float = 900) -> "subprocess.CompletedProcess[str]":
        """Run a command of the CLI."""
        return subprocess.run(
            [*LIKENESS, *words], cwd=self.root, env=self.environment(), capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip

    # The stack

    def up(self) -> None:
        """Start what of the stack does not run, on the ports that it had."""
        state = read_state(self.output)
        ports = {process.name: process.port for process in state.processes}
        words = [f"--{option}-port={ports.get(name, 0)}" for option, name in (("prefect", PREFECT), ("mlflow", MLFLOW))]
        words += [f"--reports-port={ports.get('report server', 0)}", f"--max-runs={self.num_workers}"]
        for _ in range(3):
            done = self.likeness("up", "--output-dir", str(self.output), *words)
            if done.returncode == 0:
                return
            time.sleep(2)  # the port of a killed server may take a moment
        raise RuntimeError(done.stderr)

    def start_workers(self) -> None:
        """Start the workers beside the stack's own that do not run."""
        alive = [worker for worker in self.workers if worker.is_alive()]
        server, mlflow = (read_state(self.output).find(name) for name in (PREFECT, MLFLOW))
        assert server is not None
        options = StackOptions(self.output, 0, 0, 0)
        while len(alive) < self.num_workers - 1:
            environment = {
                **self.changes(), **prefect_environment(options, server.port), **QUICK_HEARTBEATS,
                "LIKENESS_ROOTS": str(self.root),
                "LIKENESS_OUTPUT_DIR": str(self.output),
                **({"LIKENESS_MLFLOW_URL": f"http://127.0.0.1:{mlflow.port}"} if mlflow else {}),
                **self.clock.environment(),
            }  # fmt: skip
            command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
            log = self.output / "stack" / "logs" / f"worker-{len(self.workers) + 2}.log"
            alive.append(start_detached("worker", command, log=log, environment=environment))
            self.workers.append(alive[-1])

    def find_server(self, name: str) -> StackProcess | None:
        """Return a process of the stack that runs."""
        return read_state(self.output).find(name)

    def api(self) -> httpx.Client:
        """Return a client of the Prefect server."""
        return open_api(self.output)

    def submit(self, place: Place, seed: int) -> str:
        """Create a flow run as Prefect's UI does, and return its id."""
        with self.api() as client:
            return create_flow_run(client, place.settings(seed))

    # Services

    def add_place(self, name: str, kind: str) -> Place:
        """Create a place; its options become config groups of the workers."""
        llm = FaultProxy(f"http://127.0.0.1:{self.vision_port}") if kind == "s3" else None
        place = Place(name, kind, self.root / name, self.num_steps, llm)
        if llm is not None and self.bucket is not None:
            conf = self.root / "conf"
            profile = (
                (ROOT / "conf/llm/profile/local.yaml").read_text().replace("base_url: null", f"base_url: {llm.url}/v1")
            )
            write(conf / "llm" / "profile" / f"{name}.yaml", profile)
            # The vision server forgets its batch jobs when it dies, which no provider does: calls alone.
            options = f"llm: {{models: [{name}]}}\nscoring: {{executor: sync}}\n"
            write(
                conf / "llm" / f"{name}.yaml",
                f"# @package _global_\ndefaults:\n  - /llm/profile@llm.profiles.{name}: {name}\n{options}",
            )
            write(
                conf / "store" / f"{name}.yaml",
                "# @package _global_\n"
                f"store: {{kind: s3, bucket: {BUCKET}, prefix: {name}, endpoint_url: '{self.bucket.url}'}}\n",
            )
        self.places[name] = place
        return place

    def open_store(self, place: Place) -> Store:
        """Return a place's store, past the proxy."""
        if place.kind == "local":
            return LocalStore(place.folder / "store")
        from tasks.services.config import StoreConfig
        from tasks.services.store.s3 import S3Store
        from tests.support.config import make_config

        return S3Store(
            make_config(
                StoreConfig, kind="s3", folder="", bucket=BUCKET, prefix=place.name, endpoint_url=self.bucket_url
            )
        )

    def start_vision(self) -> None:
        """Start the vision server, on the port that it had."""
        words = [sys.executable, "-m", "tasks.mini.vision_server", "--port", str(self.vision_port)]
        self.vision = subprocess.Popen(
            words, cwd=self.root, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.vision.stdout is not None
        address = self.vision.stdout.readline().strip()
        self.vision_port = int(address.rsplit(":", 1)[1].split("/")[0])

    def end_vision(self) -> None:
        """Kill the vision server."""
        if self.vision is not None:
            self.vision.kill()
            self.vision.wait()
            assert self.vision.stdout is not None
            self.vision.stdout.close()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@contextmanager
def open_site(root: Path, num_workers: int, *, num_steps: int, patience: float) -> Iterator[Site]:
    """Start a site in an empty folder; stop all of it at the end."""
    import boto3
    from moto.server import ThreadedMotoServer

    shutil.rmtree(root, ignore_errors=True)
    (root / "tmp").mkdir(parents=True)
    site = Site(root, num_workers, num_steps, patience)
    site.clock.build()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    # This process composes requests too, and looks into the bucket.
    os.environ.update(
        {name: value for name, value in site.changes().items() if name.startswith(("AWS_", "LIKENESS_CONF"))}
    )
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    site.bucket_url = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=site.bucket_url, region_name="us-east-1").create_bucket(Bucket=BUCKET)
    site.bucket = FaultProxy(site.bucket_url)
    try:
        site.start_vision()
        yield site
    finally:
        close(site)
        moto.stop()


def start_stack(site: Site) -> None:
    """Start the stack and the other workers; the places must be there."""
    site.up()
    site.start_workers()


def close(site: Site) -> None:
    """Stop the stack, the other workers and the servers."""
    for worker in site.workers:
        stop(worker)
    site.likeness("down", "--output-dir", str(site.output))
    site.end_vision()
    for proxy in (site.bucket, *(place.llm for place in site.places.values())):
        if proxy is not None:
            proxy.close()


__all__ = ["MLFLOW", "PREFECT", "WORKER", "Place", "Site", "open_site", "start_stack"]
