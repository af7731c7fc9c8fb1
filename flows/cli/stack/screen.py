"""What `likeness up`, `down` and `status` do and print."""

import socket
import sqlite3
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from conf.compose import compile_request, split_store_url
from conf.request import RunRequest
from flows.cli.stack.processes import StackProcess, answers
from flows.cli.stack.registration import Notify, register
from flows.cli.stack.stack import (
    MLFLOW,
    PREFECT,
    REPORTS,
    WATCHDOG,
    WORKER,
    StackOptions,
    adopt_options,
    locked,
    prefect_environment,
    read_state,
    start_clients,
    start_servers,
    stop_stack,
    store_environment,
)
from tasks.errors import ConfigError, ServiceUnavailable
from tasks.redaction import register_secret
from tasks.services.tracking.mlflow_files import find_artifact_location

NEXT = """
  likeness submit subject.source=photos subject.class_noun=dog   a run through the worker
  likeness run ...                                               a run in this terminal, shown in the UI
  likeness run-many subjects.csv                                 one run per line, through the worker
  likeness status, likeness down                                 look at it, stop it"""

ABOUT = {WORKER: "pool likeness", WATCHDOG: "crashed runs"}


def start_stack(options: StackOptions) -> int:
    """Start what does not run and print one screen of addresses and next steps."""
    # All of it refused before anything starts.
    if options.database_url:
        check_database(options.database_url)
    if options.notify_url:
        Notify.parse(options.notify_url)
    with locked(options.output):
        state = read_state(options.output)
        options = adopt_options(options, state)
        if options.s3_url:
            check_bucket(options)
        is_running = state.find(WORKER) is not None
        note("starting Prefect, MLflow and the report server" if not is_running else "found a running stack")
        if is_running and options.notify_url:
            note("warning: a running stack keeps its --notify; `likeness down` first")
        servers = start_servers(options)
        environment = prefect_environment(options, servers.prefect.port)
        if not is_running:
            note("registering work pool, deployments and automations")
            register(environment, options)
        clients = start_clients(options, servers)
    print_processes([*servers.ordered(), *clients])
    print(f"logs      {options.folder / 'logs'}")
    defaults = store_environment(options, servers.mlflow.port)
    if defaults:
        exports = " ".join(f"{name}={value}" for name, value in defaults.items())
        print(f"objects   {options.s3_url}; for `likeness run` in a terminal: export {exports}")
    print(NEXT)
    return 0


def check_bucket(options: StackOptions) -> None:
    """Reach a bucket, and try what leases need, before anything starts. Raises ConfigError or ServiceUnavailable."""
    from tasks.services.store.s3 import S3Store

    config = compile_request(RunRequest(settings=split_store_url(options.s3_url, name="--s3")))
    S3Store(config.store).check_conditional_writes()
    note_local_artifacts(options.output / "mlflow.db", config.tracking.experiment)


def note_local_artifacts(database: Path, experiment: str) -> None:
    """Warn where an experiment that earlier runs created keeps its artifacts on the disk."""
    try:
        location = find_artifact_location(database, experiment)
    except sqlite3.Error:  # damaged: the server says so when it starts
        return
    if location.startswith("file:"):
        note(
            f"warning: artifacts of experiment {experiment!r} stay in {location}, since it was created without --s3; "
            "runs with another tracking.experiment put theirs into the bucket"
        )


def check_database(url: str) -> None:
    """Connect to the database's port before anything starts.

    Raises:
        ConfigError: the address is of another form.
        ServiceUnavailable: nothing answers there.

    """
    try:
        address = urlsplit(url)
        host, port = address.hostname, address.port or 5432
    except ValueError:  # a port that is no number
        host, port = None, 0
    if not url.startswith("postgresql+asyncpg://") or not host:
        raise ConfigError(
            "--postgres takes postgresql+asyncpg://HOST:PORT/DATABASE, with user and password before HOST"
        )
    # Errors quote what they are about: as it was typed, and as it is.
    for password in filter(None, (address.password, unquote(address.password or ""))):
        register_secret(password)
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        reason = f"the database at {host}:{port} does not answer ({error.strerror or error})"
        raise ServiceUnavailable(f"{reason}; start it, or leave out --postgres") from error


def end_stack(output: Path) -> int:
    """Stop the stack."""
    with locked(output):
        note("stopping; runs in progress save their state")
        stopped = stop_stack(output)
    print(f"stopped: {', '.join(stopped)}" if stopped else f"no stack runs in {output}")
    return 0


def show_status(output: Path) -> int:
    """Print the processes; 0 where all of them run, else 4."""
    state = read_state(output)
    if not state.processes:
        print(f"no stack runs in {output}; `likeness up` starts one")
        return 4
    print_processes(list(state.processes))
    names = {process.name for process in state.processes if is_healthy(process)}
    return 0 if names == {PREFECT, MLFLOW, REPORTS, WORKER, WATCHDOG} else 4


def is_healthy(process: StackProcess) -> bool:
    """Whether a process runs and answers."""
    paths = {PREFECT: "api/health", MLFLOW: "health", REPORTS: "health"}
    url = f"http://127.0.0.1:{process.port}/{paths.get(process.name, '')}"
    return process.is_alive() and (process.name not in paths or answers(url))


def print_processes(processes: list[StackProcess]) -> None:
    """Print one line per process."""
    for process in processes:
        address = f"http://127.0.0.1:{process.port}" if process.port else ABOUT.get(process.name, "")
        mark = "running" if is_healthy(process) else "NOT RUNNING"
        print(f"{process.name:<15} {address:<26} {mark:<12} pid {process.pid}")


def note(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)
