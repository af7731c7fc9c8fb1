"""Processes of the stack: started detached, found again by pid and start time, stopped with all below them."""

import contextlib
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from pydantic import BaseModel

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.services.store.lease import find_start, is_same_process, read_boot

OWN_SECRETS = ("LIKENESS_NOTIFY_URL", "LIKENESS_DATABASE_URL")
"""Variables of `likeness up` that no other process needs."""
STOP_SECONDS = 40.0  # training saves its checkpoint within `training.grace_seconds`


class StackProcess(BaseModel):
    """One running process."""

    name: str
    pid: int
    started: float
    """By `find_start`."""
    boot: str
    """Which start of the machine."""
    port: int = 0
    log: str = ""

    def is_alive(self) -> bool:
        """Whether this very process runs: a pid alone is reused by others."""
        return is_same_process(self.pid, self.started, self.boot)


def check_port(port: int, *, option: str) -> int:
    """Return a free loopback port, any for 0. Raises ConfigError where it is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"port {port} is in use by another program; choose one with {option}") from error
        found: int = probe.getsockname()[1]
    return found


def start_detached(
    name: str, command: list[str], *, log: Path, environment: dict[str, str], port: int = 0
) -> StackProcess:
    """Start a process that outlives this one, in a session of its own, with its output in a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # Not Popen, which warns where it is dropped while its process runs: this one is meant to outlive us.
    pid = os.posix_spawn(
        command[0],
        command,
        {**{name: value for name, value in os.environ.items() if name not in OWN_SECRETS}, **environment},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return StackProcess(name=name, pid=pid, started=find_start(pid), boot=read_boot(), port=port, log=str(log))


def wait_healthy(process: StackProcess, is_healthy: Callable[[], bool], *, seconds: float) -> None:
    """Wait until a process answers. Raises ServiceUnavailable where it ends, or does not answer in time."""
    deadline = time.monotonic() + seconds
    while not is_healthy():
        if not process.is_alive():
            raise ServiceUnavailable(f"{process.name} ended while it started: {last_line(Path(process.log))}")
        if time.monotonic() > deadline:
            raise ServiceUnavailable(f"{process.name} did not answer within {seconds:.0f} s; see {process.log}")
        time.sleep(0.2)


def last_line(log: Path) -> str:
    """Return the last line of a log, with the log's name."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return f"{lines[-1][:300] if lines else 'its log is empty'}; see {log}"


def answers(url: str) -> bool:
    """Whether a URL answers with a success."""
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - our own loopback addresses
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def stop(process: StackProcess, *, seconds: float = STOP_SECONDS) -> bool:
    """Stop a process and all below it; return whether it was running."""
    if not process.is_alive():
        return False
    stop_family(process.pid, seconds=seconds)
    return True


def stop_family(pid: int, *, seconds: float = STOP_SECONDS) -> None:
    """Stop a process, then all descendants that it leaves behind."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        # Listed first: once the root is gone its children belong to init.
        family = [root, *root.children(recursive=True)]
        signal_all([root], signal.SIGTERM)
        wait_ended([root], seconds=seconds)
        # A worker leaves the processes of its flow runs behind; these save their state on SIGTERM.
        signal_all(family, signal.SIGTERM)
        wait_ended(family, seconds=seconds)
        signal_all(family, signal.SIGKILL)
        wait_ended(family, seconds=10)


def signal_all(family: Sequence[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to all processes that still run."""
    for member in family:
        if has_not_ended(member):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)


def wait_ended(family: Sequence[psutil.Process], *, seconds: float) -> None:
    """Wait until all processes have ended, for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while any(map(has_not_ended, family)) and time.monotonic() < deadline:
        time.sleep(0.05)


def has_not_ended(process: psutil.Process) -> bool:
    """Whether a process runs. One that nobody reaps, as in a container without init, has ended too."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
