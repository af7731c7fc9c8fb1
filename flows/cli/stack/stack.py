"""The local stack of an output folder: Prefect server, MLflow server and a worker, on loopback.

`stack/state.json` in the output folder names the processes; their logs and Prefect's database lie beside it.
"""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel

from conf.compose import normalize_store_url
from flows.cli.stack.processes import StackProcess, answers, check_port, start_detached, stop, wait_healthy
from tasks.errors import ArtifactCorrupt, ConfigError
from tasks.services.tracking.mlflow_tracker import create_database
from tasks.stage.digests import dump_signed, load_signed
from tasks.stage.files import write_atomic
from tasks.stage.worker_process import SOURCE_ROOT

POOL = "likeness"
PREFECT, MLFLOW, REPORTS = "Prefect server", "MLflow server", "report server"
WORKER, WATCHDOG = "worker", "watchdog"
START_SECONDS = 180.0
DEFAULT_MAX_RUNS = 2
LEASES = "prefect.server.concurrency.lease_storage.filesystem"
HOST_LIMIT = "LIKENESS_HOST_LIMIT"
"""The concurrency limit of trainings on this host, for its workers."""
HEARTBEATS = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
LEAST_HEARTBEAT_SECONDS = 30
"""Prefect's own bound."""


class KeptOptions(BaseModel):
    """What a later `up` of the same stack must not change: where its data lies, and how much runs at a time."""

    s3_url: str = ""
    database: str = ""
    """Address of Prefect's database without a password; empty: SQLite."""
    max_runs: int = DEFAULT_MAX_RUNS
    heartbeat_seconds: int = 180
    """How often its runs say that they live."""


class StackState(BaseModel):
    """The processes of a stack."""

    processes: tuple[StackProcess, ...] = ()
    kept: KeptOptions | None = None

    def find(self, name: str) -> StackProcess | None:
        """Return a process that runs."""
        found = [process for process in self.processes if process.name == name and process.is_alive()]
        return found[0] if found else None


@dataclass(frozen=True)
class StackOptions:
    """Where a stack runs."""

    output: Path
    prefect_port: int
    mlflow_port: int
    reports_port: int
    max_runs: int | None = None
    """Runs of the pool at a time, whichever worker executes them; None: as the stack had, else DEFAULT_MAX_RUNS."""
    notify_url: str = field(default="", repr=False)
    """Where messages about runs are posted; empty: nowhere."""
    database_url: str = field(default="", repr=False)
    """Prefect's database; empty: SQLite in the stack's folder."""
    s3_url: str = ""
    """Bucket and prefix of objects and MLflow's artifacts; empty: the output folder."""
    kept: KeptOptions = field(default_factory=KeptOptions)
    """What the stack's state records; `adopt_options` fills it in."""

    @property
    def folder(self) -> Path:
        """The folder of state, logs and Prefect's database."""
        return self.output / "stack"


def read_state(output: Path) -> StackState:
    """Return the recorded processes; none where the record is missing. Raises ConfigError where it is damaged."""
    path = output / "stack" / "state.json"
    try:
        return load_signed(StackState, path.read_bytes())
    except FileNotFoundError:
        return StackState()
    except (ArtifactCorrupt, OSError) as error:
        raise ConfigError(f"{path}: {error}; stop the processes by hand and delete it") from error


def write_state(options: StackOptions, *processes: StackProcess) -> None:
    """Record the processes, and the options that the next `up` keeps."""
    state = StackState(processes=processes, kept=options.kept)
    write_atomic(options.folder / "state.json", dump_signed(state, indent=1))


def adopt_options(options: StackOptions, state: StackState) -> StackOptions:
    """Return options where those that were not given are as the stack had them.

    Otherwise a worker that is started again would look for objects elsewhere than the one before it, and its runs would
    compute and pay again.

    Raises:
        ConfigError: a given one differs from that of processes that run, or the database's password is needed again.

    """
    typed = KeptOptions(
        s3_url=normalize_store_url(options.s3_url, name="--s3") if options.s3_url else "",
        database=strip_password(options.database_url),
        max_runs=options.max_runs or DEFAULT_MAX_RUNS,
    )
    before = state.kept or typed
    heartbeats = read_heartbeat_seconds()
    running = [process.name for process in state.processes if process.is_alive()]
    kept = KeptOptions(
        s3_url=typed.s3_url or before.s3_url,
        database=typed.database or before.database,
        max_runs=typed.max_runs if options.max_runs else before.max_runs,
        heartbeat_seconds=heartbeats or before.heartbeat_seconds,
    )
    for option, old, new in (
        ("--s3", before.s3_url, kept.s3_url),
        ("--postgres", before.database, kept.database),
        ("--max-runs", before.max_runs, kept.max_runs),
        (HEARTBEATS, before.heartbeat_seconds, kept.heartbeat_seconds),
    ):
        if running and old != new:
            had = f"{option} {old}" if old else f"no {option}"
            raise ConfigError(f"{', '.join(running)} run with {had}, not {option} {new}; `likeness down` first")
    if kept.database and not options.database_url and PREFECT not in running:
        raise ConfigError(
            f"Prefect's database of this stack is {kept.database}, whose password is not recorded; "
            "give --postgres again, or `likeness down` first"
        )
    return replace(options, s3_url=kept.s3_url, max_runs=kept.max_runs, kept=kept)


def read_heartbeat_seconds() -> int | None:
    """Return how often runs should send heartbeats; None where the environment doesn't say. Raises ConfigError."""
    text = os.environ.get(HEARTBEATS)
    if not text:
        return None
    if not text.isdecimal() or not LEAST_HEARTBEAT_SECONDS <= int(text) <= 86_400:
        raise ConfigError(f"{HEARTBEATS}={text[:20]!r}: seconds, at least {LEAST_HEARTBEAT_SECONDS}")
    return int(text)


def strip_password(url: str) -> str:
    """Return a database's address without password and parameters, which may hold one too."""
    if not url:
        return ""
    parts = urlsplit(url)
    user, separator, host = parts.netloc.rpartition("@")
    return urlunsplit((parts.scheme, f"{user.partition(':')[0]}{separator}{host}", parts.path, "", ""))


def find_api_url(output: Path) -> str:
    """Return the address of a running stack's Prefect API; empty where none runs."""
    with contextlib.suppress(ConfigError):
        server = read_state(output).find(PREFECT)
        if server is not None:
            return f"http://127.0.0.1:{server.port}/api"
    return ""


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the stack's lock, so that two commands at once don't start two stacks."""
    path = output / "stack" / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise ConfigError(f"cannot write to {path.parent}: {error.strerror}; choose --output-dir") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Servers:
    """The servers of a stack."""

    prefect: StackProcess
    mlflow: StackProcess
    reports: StackProcess

    def ordered(self) -> tuple[StackProcess, ...]:
        """Return them in the order in which they are shown."""
        return self.prefect, self.mlflow, self.reports


def start_servers(options: StackOptions) -> Servers:
    """Start the servers that don't run, all at once, and wait until they answer."""
    state = read_state(options.output)
    found = {name: state.find(name) for name in (PREFECT, MLFLOW, REPORTS)}
    wanted = {
        PREFECT: (options.prefect_port, "--prefect-port"),
        MLFLOW: (options.mlflow_port, "--mlflow-port"),
        REPORTS: (options.reports_port, "--reports-port"),
    }
    # Ports are checked before anything starts.
    ports = {
        name: process.port if process else check_port(wanted[name][0], option=wanted[name][1])
        for name, process in found.items()
    }
    if not found[MLFLOW]:
        # Whole: a server that is killed meanwhile would leave half of it.
        create_database(options.output, is_served=True)
    started: dict[str, StackProcess] = {}
    for name, process in found.items():
        started[name] = process or start_server(options, name, ports[name])
        others = [each for each in found.values() if each and each.name not in started]
        # After each: what a killed `up` has started is found by the next one, and stopped by `down`.
        write_state(options, *started.values(), *others, *filter(None, map(state.find, (WORKER, WATCHDOG))))
    for name, path in ((PREFECT, "api/health"), (MLFLOW, "health"), (REPORTS, "health")):
        url = f"http://127.0.0.1:{ports[name]}/{path}"
        wait_healthy(started[name], partial(answers, url), seconds=START_SECONDS)
    return Servers(started[PREFECT], started[MLFLOW], started[REPORTS])


def start_server(options: StackOptions, name: str, port: int) -> StackProcess:
    """Start one server, detached."""
    commands = {
        PREFECT: ["uvicorn", "--factory", "prefect.server.api.server:create_app", "--lifespan", "on",
                  "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"],
        MLFLOW: ["mlflow", "server", "--backend-store-uri", f"sqlite:///{options.output / 'mlflow.db'}",
                 "--artifacts-destination", find_artifacts(options), "--host", "127.0.0.1",
                 "--port", str(port), "--workers", "1"],
        REPORTS: ["flows.cli.main", "serve", "--port", str(port), "--output-dir", str(options.output)],
    }  # fmt: skip
    environments = {
        PREFECT: {**prefect_environment(options, port), **database_environment(options)},
        # The job runner takes a gigabyte and nine processes, and nothing here uses it.
        MLFLOW: {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        REPORTS: {"PYTHONPATH": str(SOURCE_ROOT)},
    }
    environments[MLFLOW] |= s3_environment()
    log = options.folder / "logs" / f"{name.lower().replace(' ', '-')}.log"
    command = [sys.executable, "-m", *commands[name]]
    return start_detached(name, command, log=log, environment=environments[name], port=port)


def find_artifacts(options: StackOptions) -> str:
    """Return where MLflow's artifacts go: beside the store's objects in a bucket, else into the output folder."""
    # With the prefix that the store takes where the address has none: the policy of a worker allows no other.
    url = normalize_store_url(options.s3_url, name="--s3") if options.s3_url else ""
    return f"{url}/mlflow" if url else str(options.output / "artifacts")


def s3_environment() -> dict[str, str]:
    """Return the endpoint for MLflow, which reads it from a variable of its own."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return {"MLFLOW_S3_ENDPOINT_URL": endpoint} if endpoint else {}


def store_environment(options: StackOptions, mlflow_port: int) -> dict[str, str]:
    """Return the defaults of runs where objects go to a bucket: artifacts get there through the server alone."""
    if not options.s3_url:
        return {}
    return {"LIKENESS_STORE_URL": options.s3_url, "LIKENESS_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}"}


def prefect_environment(options: StackOptions, port: int) -> dict[str, str]:
    """Return the environment of the server, of the worker and of what registers deployments."""
    home = options.folder / "prefect"
    environment = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # In memory, its default, a restart of the server would leak every slot of the host's limit.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES,
        # All processes of the stack agree on it: runs send them, automation and watchdog miss them.
        HEARTBEATS: str(options.kept.heartbeat_seconds),
        HOST_LIMIT: f"likeness-{socket.gethostname()}",
        "LIKENESS_HOME": str(SOURCE_ROOT),
        # The worker runs in the checkout; what a request may read lies where `up` was typed, and in the output folder.
        "LIKENESS_ROOTS": os.environ.get("LIKENESS_ROOTS") or os.pathsep.join((str(Path.cwd()), str(options.output))),
        "NO_PROXY": "127.0.0.1,localhost",
    }
    return environment


def database_environment(options: StackOptions) -> dict[str, str]:
    """Return the database's address, which may hold a password: of the server alone."""
    return {"PREFECT_API_DATABASE_CONNECTION_URL": options.database_url} if options.database_url else {}


def start_clients(options: StackOptions, servers: Servers) -> tuple[StackProcess, StackProcess]:
    """Start a worker of the process pool, and the watchdog of crashed runs, where they don't run."""
    state = read_state(options.output)
    environment = prefect_environment(options, servers.prefect.port)
    worker = state.find(WORKER) or start_detached(
        WORKER,
        # Without --limit: a worker with one dies of a run that is rescheduled while it still holds the run's slot
        # (RuntimeError of anyio's CapacityLimiter, unhandled by prefect 3.8.8). The pool's limit is the server's.
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"],
        log=options.folder / "logs" / "worker.log",
        environment={
            **environment,
            "LIKENESS_OUTPUT_DIR": str(options.output),
            "LIKENESS_MLFLOW_URL": f"http://127.0.0.1:{servers.mlflow.port}",
            "LIKENESS_REPORTS_URL": f"http://127.0.0.1:{servers.reports.port}",
            **store_environment(options, servers.mlflow.port),
        },
    )
    watchdog = state.find(WATCHDOG)
    write_state(options, *servers.ordered(), worker, *filter(None, [watchdog]))
    watchdog = watchdog or start_detached(
        WATCHDOG,
        [sys.executable, "-m", "flows.cli.stack.watchdog"],
        log=options.folder / "logs" / "watchdog.log",
        environment={**environment, "PYTHONPATH": str(SOURCE_ROOT)},
    )
    write_state(options, *servers.ordered(), worker, watchdog)
    return worker, watchdog


def stop_stack(output: Path) -> list[str]:
    """Stop what `up` started; return the names of what was running."""
    processes = read_state(output).processes[::-1]
    clients = [process for process in processes if process.name in (WORKER, WATCHDOG)]
    servers = [process for process in processes if process not in clients]
    stopped: list[str] = []
    # Clients first: runs that save their state report it to the servers.
    for group in filter(None, (clients, servers)):
        with ThreadPoolExecutor(len(group)) as pool:
            was_running = list(pool.map(stop, group))
        stopped += [process.name for process, ran in zip(group, was_running, strict=True) if ran]
    (output / "stack" / "state.json").unlink(missing_ok=True)
    return stopped
