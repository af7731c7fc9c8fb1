"""Attempts of one flow run: crashed ones are rescheduled by an automation, which counts nothing itself.

A cancelled one ends, whoever started it.
"""

import datetime
import logging
import os
import select
import shutil
import signal
import socket
import threading
import uuid
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
import psutil
from prefect.client.orchestration import get_client
from prefect.exceptions import Abort, PrefectException, TerminationSignal
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled

from conf.compose import compile_request
from conf.request import RunRequest
from conf.trust import allowed_roots
from flows.runs.records import is_alive, list_run_folders, list_summaries, read_summary
from tasks.errors import LikenessError
from tasks.manifests.run_summary import ProcessOwner, RunSummary
from tasks.stage.progress import outlive_reader

MAX_ATTEMPTS = 5
MAX_SKEW_SECONDS = 30.0
"""Between this machine's clock and the server's; a third of the window in which a heartbeat must arrive."""
CANCEL_POLL_SECONDS, CANCEL_LOOKS = 20.0, 3
"""A worker kills what it cancels after 30 s."""
F = TypeVar("F", bound=Callable[..., Any])
log = logging.getLogger(__name__)


class CancelWatch:
    """Ends this process's flow where it is cancelled on the server and nobody else does it.

    A worker watches for that too, but no longer once the server has left three polls unanswered (prefect 3.8.8); a
    run that no worker started is only marked.
    """

    is_active = False
    """Whether a flow of this process is watched: those that it calls end with it."""

    def __init__(self, flow_run_id: str) -> None:
        self.flow_run_id = uuid.UUID(flow_run_id)
        self.is_cancelled = self.is_over = False
        self.lock = threading.Lock()
        # Python writes the number of each signal into it. Another handler in place of Prefect's would make a worker
        # believe that this process knows nothing of cancellations.
        self.signals, self.signals_end = os.pipe()
        # Made here: a new thread has none of the settings of this context, such as the server's address.
        self.client = get_client(sync_client=True)

    def __enter__(self) -> "CancelWatch":
        os.set_blocking(self.signals_end, False)
        self.earlier = signal.set_wakeup_fd(self.signals_end, warn_on_full_buffer=False)
        CancelWatch.is_active = True
        threading.Thread(target=self.watch, name="cancel-watch", daemon=True).start()
        return self

    def __exit__(self, *caught: object) -> None:
        try:
            with self.lock:  # from here on no signal is sent
                self.is_over = True
        finally:
            CancelWatch.is_active = False
            signal.set_wakeup_fd(self.earlier)
            os.close(self.signals_end)  # which ends the thread

    def watch(self) -> None:
        """Send SIGTERM to this process once the run stays cancelled for as long as a worker needs to end it.

        Not where a signal has arrived: the flow ends already, maybe saving, which a second one would cut off.
        """
        looks = 0
        try:
            with self.client:
                while looks < CANCEL_LOOKS:
                    if select.select([self.signals], [], [], CANCEL_POLL_SECONDS)[0] and self.is_ending():
                        return
                    looks = looks + 1 if self.is_marked() else 0
            with self.lock:
                if not self.is_over and not select.select([self.signals], [], [], 0)[0]:
                    self.is_cancelled = True
                    os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.close(self.signals)

    def is_ending(self) -> bool:
        """Read the signals that have arrived; whether one of them ends the flow, or the flow is over."""
        arrived = os.read(self.signals, 4096)
        return not arrived or bool({signal.SIGTERM, signal.SIGINT} & set(arrived))

    def is_marked(self) -> bool:
        """Whether the server says that the run is cancelled."""
        try:
            state = self.client.read_flow_run(self.flow_run_id).state
        except (httpx.HTTPError, PrefectException, OSError, ValueError):
            return False
        return state is not None and (state.is_cancelling() or state.is_cancelled())


def end_when_cancelled(flow: F) -> F:
    """Decorate a flow's function: it saves and ends as Cancelled once the flow run is cancelled."""

    @wraps(flow)
    def run(*args: Any, **named: Any) -> Any:
        if deployment.id is not None:
            outlive_reader()  # before the flow's first line
        own = None if CancelWatch.is_active else flow_run.id
        # Python takes signals in the main thread alone.
        if own is None or threading.current_thread() is not threading.main_thread():
            return flow(*args, **named)
        watch = CancelWatch(own)
        try:
            with watch:
                return flow(*args, **named)
        except (TerminationSignal, KeyboardInterrupt):
            if not watch.is_cancelled:
                raise
            return Cancelled(message="cancelled; what was computed is kept")

    return cast(F, run)


def check_attempts() -> None:
    """Raise LikenessError where this run was started too often: what kills its process would kill it again."""
    # A failed run is not rescheduled, unlike a crashed one.
    count = flow_run.run_count or 0
    if count > MAX_ATTEMPTS:
        raise LikenessError(
            f"the run crashed {MAX_ATTEMPTS} times; look at its logs, then `likeness resume` it by hand"
        )


def warn_of_clock() -> None:
    """Warn where this machine's clock is off: by its time the server tells whether a run sends heartbeats.

    Where it is behind by more than the window, Prefect's automation takes a living run for lost and starts another
    attempt, which waits for the first one's lease.
    """
    try:
        with get_client(sync_client=True) as client:
            date = client.request("GET", "/health").headers["date"]
        # A date without a time zone can't be compared.
        seconds = (datetime.datetime.now(datetime.UTC) - parsedate_to_datetime(date)).total_seconds()
    except (httpx.HTTPError, OSError, KeyError, ValueError, TypeError):  # a check costs no run
        return
    if abs(seconds) > MAX_SKEW_SECONDS:
        side = "ahead of" if seconds > 0 else "behind"
        log.warning(
            "the clock of %s is %.0f s %s the Prefect server's: living runs may be taken for lost; set it by NTP",
            socket.gethostname(), abs(seconds), side,
        )  # fmt: skip


def find_finished_attempt(request: RunRequest, *, is_trusted: bool) -> RunSummary | None:
    """Return the summary of this flow run where an earlier attempt has finished; `is_trusted` is as of `open_run`.

    On SQLite, Prefect may look at a crash again after 15 minutes, and schedule a run again that has completed since.
    """
    own = flow_run.id
    if own is None or (flow_run.run_count or 0) < 2:
        return None
    # A restricted request may name no file outside its roots, here as in `open_run`: errors quote what is in it.
    config = compile_request(request, roots=None if is_trusted else allowed_roots())
    summaries = list_summaries(Path(config.output_dir))
    return next((each for each in summaries if each.flow_run_id == own and each.status == "finished"), None)


def leave_to_earlier_attempt(folder: Path) -> None:
    """End this process where another one of this host already executes the same flow run.

    A worker reports the death of a process twice, on a loaded machine a minute apart: the automation then reschedules
    an attempt that runs again already.

    Raises:
        Abort: Prefect's; the process exits and leaves the flow run's state to the other one.

    """
    summary = read_summary(folder)
    own = summary.owner
    if own is None or not summary.flow_run_id:
        return
    for other in list_run_folders(folder.parent):
        found = read_summary(other) if other != folder else None
        if found is None or found.flow_run_id != summary.flow_run_id or found.status != "running":
            continue
        # Of two that see each other, the later one goes.
        if found.owner is not None and is_working(found.owner) and start_of(found.owner) < start_of(own):
            shutil.rmtree(folder, ignore_errors=True)
            raise Abort(f"process {found.owner.pid} executes this run already, as {other.name}")


def is_working(owner: ProcessOwner) -> bool:
    """Whether a process of this host runs and is not suspended."""
    # Nothing is known of other hosts. There, and where a process is suspended, the leases of stages decide.
    if owner.host != socket.gethostname() or not is_alive(owner):
        return False
    try:
        return bool(psutil.Process(owner.pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))
    except psutil.Error:
        return False


def start_of(owner: ProcessOwner) -> tuple[float, int]:
    """Return what orders processes by their start."""
    return owner.started, owner.pid
