"""Live tracking: metrics are sent from a thread of their own while a stage runs, so a slow server delays nothing.

What a server that is down doesn't take stays in the run's journal, and is sent in order when the server is back: by
the thread, with the publication, or by the next run.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tasks.errors import LikenessError, ServiceUnavailable, first_line
from tasks.services.tracking.base import RUN_TAG, DatasetInfo, MetricRow, NoTracker, Tracker
from tasks.services.tracking.journal import Journal, Record
from tasks.services.tracking.system_metrics import sample_system

log = logging.getLogger(__name__)
LONGEST_WAIT_SECONDS = 60.0
ABANDON_SECONDS = 5.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0


@dataclass
class LiveRun:
    """The tracking run of one flow run: opened at the first computation, closed when it is published or fails."""

    tracker: Tracker
    name: str
    params: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)
    logged: set[tuple[str, int]] = field(default_factory=set)
    """Names and steps of what the server has."""
    run_id: str | None = None
    is_open: bool = False
    thread: threading.Thread | None = None
    journal: Journal = field(default_factory=Journal)
    server: str = ""
    """Where the run is tracked, as the journal names it."""
    experiment: str = ""
    reopen: Callable[[], Tracker] | None = None
    """Opens another tracker of the same server, for use while the thread blocks in a call of this one."""
    system_metrics_interval: float | None = None
    """Seconds between samples of CPU, memory and GPU; None: they are not measured."""
    send_left_over: Callable[[], None] = lambda: None
    """Sends the journals of earlier runs, once the server answers."""
    closed: bool = False
    """Whether waiting for the thread timed out: the tracker then belongs to the thread."""
    is_replayed: bool = False
    """Whether another run sends the journal: runs with the same `stale_tag` may be newer, and alive."""
    ended: bool = False
    is_draining: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)
    changed: threading.Event = field(default_factory=threading.Event)
    """Set where there is something new for the thread."""

    def begin(self, *, tags: dict[str, str], stale_tag: str, datasets: Sequence[DatasetInfo]) -> None:
        """Open the run and mark earlier ones with the same `stale_tag` that were never closed; returns at once."""
        if self.thread is not None:
            return
        self.journal.open()
        self.queue_start(tags=tags, stale_tag=stale_tag, datasets=datasets)
        self.thread = threading.Thread(target=self._work, name="live-tracking", daemon=True)
        self.thread.start()
        if self.system_metrics_interval is not None:
            words = {"interval": self.system_metrics_interval, "stopped": self.stopped}
            threading.Thread(
                target=sample_system, args=[self.log_metrics], kwargs=words, name="system-metrics", daemon=True
            ).start()

    def queue_start(self, *, tags: dict[str, str], stale_tag: str, datasets: Sequence[DatasetInfo]) -> None:
        """Record the start of the run, with all that another process needs to send it."""
        all_tags = {**self.tags, **tags, RUN_TAG: self.name}
        self.journal.append(
            Record(
                kind="start", server=self.server, experiment=self.experiment, name=self.name, params=self.params,
                tags=all_tags, stale_tag=stale_tag, datasets=tuple(datasets),
            )
        )  # fmt: skip

    def log_metrics(self, rows: Iterable[MetricRow]) -> None:
        """Queue metrics for sending; rows missing from `logged` are sent when the run is published."""
        if self.thread is None or self.closed or self.stopped.is_set():
            return
        # Read here: the iterable belongs to the caller's thread.
        self.journal.append(Record(kind="metrics", rows=tuple(rows)))
        self.changed.set()

    def drain(self, *, seconds: float | None = None) -> bool:
        """Wait until the thread has sent what it can; return whether it has ended: the caller then owns the tracker."""
        self.stopped.set()
        if self.thread is not None and self.thread.is_alive() and not self.closed:
            self.is_draining = True
            self.changed.set()
            self.thread.join(LONGEST_WAIT_SECONDS if seconds is None else seconds)
        # Under the lock that `_work` sets `ended` with: exactly one of caller and thread closes the run.
        with self.lock:
            self.closed = self.closed or (self.thread is not None and not self.ended)
            if self.closed:
                self.run_id, self.is_open = None, False
        return not self.closed

    def take_over(self) -> Tracker:
        """Drain and return a tracker for the caller: another one where the thread still blocks in this one.

        Raises ServiceUnavailable where the server does not take what is in the journal.
        """
        if not self.drain():
            log.warning("the tracking server is slow: metrics go to a separate run")
            return self.reopen() if self.reopen is not None else NoTracker()
        self.send_pending()
        self.send_left_over()
        return self.tracker

    def send_pending(self) -> None:
        """Send all records; for the owner of the tracker. Raises ServiceUnavailable."""
        while self.journal.pending:
            self._send(self.journal.pending[0])

    def complete(self) -> None:
        """Remove the journal: the run is published, or a repeated publication replaces it."""
        if not self.closed:
            self.journal.remove()

    def abandon(self) -> None:
        """Close a run that will not be published as failed; what is not sent by then is left to the next run."""
        if self.thread is not None and not self.closed:
            self.journal.append(Record(kind="finish"))
        if self.drain(seconds=ABANDON_SECONDS):
            self._send_last()
            self._end_journal()

    def _send_last(self) -> None:
        """Send what was logged after the thread had ended, such as the end of a run whose publication failed."""
        try:
            if self.journal.pending:
                self.tracker.check()  # MLflow would wait for minutes
                self.send_pending()
        except LikenessError as error:
            log.warning("the tracking run stays open: %s", error)

    def _end_journal(self) -> None:
        """Remove the journal, or leave to the next run what is in it."""
        if self.journal.pending:
            log.warning("the tracking server is sent %d records with the next run", len(self.journal.pending))
            self.journal.close()
        else:
            self.journal.remove()

    def _work(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self.closed:
            self.changed.clear()
            if not self.journal.pending:
                if self.is_draining:
                    break
                self.changed.wait()
                continue
            try:
                # A few milliseconds; where nobody answers, MLflow's own retries would block the call for minutes.
                self.tracker.check()
                self._send(self.journal.pending[0])
                pause = FIRST_PAUSE_SECONDS
            except Exception as error:  # a failure of the tracking server must not end the training
                if pause == FIRST_PAUSE_SECONDS:
                    log.warning("tracking call failed, metrics are kept and sent later: %s", error)
                if self.is_draining:
                    break
                self._pause(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        with self.lock:
            self.ended = True
        if self.closed:  # `drain` timed out, so this thread closes the run that it opened
            try:
                self.tracker.finish(is_failed=True)
            except Exception as error:
                log.warning("a tracking run stays open: %s", error)
            else:
                self._end_journal()

    def _pause(self, seconds: float) -> None:
        """Wait, but not while the caller of `drain` does."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not self.is_draining and not self.closed:
            self.changed.wait(left)
            self.changed.clear()

    def _send(self, record: Record) -> None:
        """Send the oldest record and acknowledge it. Raises ServiceUnavailable where it has to be sent again."""
        try:
            if record.kind == "start":
                self._open(record)
            elif record.kind == "metrics" and self.is_open:
                self.tracker.log_metrics(record.rows, at_ms=record.at_ms)
                # After the call, so that rows of a failed one are sent again.
                self.logged.update((name, step) for name, _, step in record.rows)
            elif record.kind == "finish" and self.is_open:
                self.tracker.finish(is_failed=True)
                self.is_open = False
        except ServiceUnavailable:
            raise
        except Exception as error:  # refused, as it will be next time: the records after it must not wait for it
            log.warning("a tracking call was refused: %s", first_line(error))
        self.journal.acknowledge(record, run_id=self.run_id)

    def _open(self, record: Record) -> None:
        """Open the tracking run."""
        if record.stale_tag and not self.is_replayed:
            # Not the run itself, which is there where the answer of an earlier call was lost.
            value, own = record.tags[record.stale_tag], record.tags.get(RUN_TAG, "")
            self.tracker.close_stale(tag=record.stale_tag, value=value, except_run=own)
        # The call may return after `drain` has given up. Such a run is closed by `_work`, never published to.
        run_id = self.tracker.start(name=record.name, params=record.params, tags=record.tags, started_ms=record.at_ms)
        with self.lock:
            if self.closed:
                return
            self.run_id, self.is_open = run_id, True
        self.tracker.log_datasets(record.datasets)
        self.send_left_over()
