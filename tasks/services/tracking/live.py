"""Live tracking: metrics are sent from a thread of their own while a stage runs, so a slow server delays nothing."""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tasks.errors import LikenessError
from tasks.services.tracking.base import DatasetInfo, NoTracker, Tracker

log = logging.getLogger(__name__)
Row = tuple[str, float, int]
LONGEST_WAIT_SECONDS = 60.0
ABANDON_SECONDS = 5.0


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
    pending: "queue.Queue[Callable[[], None] | None]" = field(default_factory=queue.Queue)
    reopen: Callable[[], Tracker] | None = None
    """Opens another tracker of the same server, for use while the thread blocks in a call of this one."""
    closed: bool = False
    """Whether waiting for the thread timed out: the tracker then belongs to the thread."""
    ended: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, *, tags: dict[str, str], stale_tag: str, datasets: Sequence[DatasetInfo]) -> None:
        """Open the run and mark earlier ones with the same `stale_tag` that were never closed; returns at once."""
        if self.thread is not None:
            return

        def open_run() -> None:
            self.tracker.close_stale(tag=stale_tag, value=tags[stale_tag])
            # The call may return after `drain` has given up. Such a run is closed by `_work`, never published to.
            run_id = self.tracker.start(name=self.name, params=self.params, tags={**self.tags, **tags})
            with self.lock:
                if self.closed:
                    return
                self.run_id, self.is_open = run_id, True
            self.tracker.log_datasets(datasets)

        self.pending.put(open_run)
        self.thread = threading.Thread(target=self._work, name="live-tracking", daemon=True)
        self.thread.start()

    def log_metrics(self, rows: Iterable[Row]) -> None:
        """Queue metrics for sending; rows missing from `logged` are sent when the run is published."""
        if self.thread is None or self.closed:
            return
        # Read here: the iterable belongs to the caller's thread.
        kept = list(rows)

        def send() -> None:
            # Without an open run, rows stay out of `logged` and are sent with the publication.
            if self.is_open:
                self.tracker.log_metrics(kept)
                # After the call, so that rows of a failed one are sent again with the publication.
                self.logged.update((name, step) for name, _, step in kept)

        self.pending.put(send)

    def drain(self, *, seconds: float | None = None) -> bool:
        """Wait until the queue is empty; return whether the thread has ended, so that the caller owns the tracker."""
        if self.thread is not None and self.thread.is_alive() and not self.closed:
            self.pending.put(None)  # ends `_work` after the rows queued before it
            self.thread.join(LONGEST_WAIT_SECONDS if seconds is None else seconds)
        # Under the lock that `_work` sets `ended` with: exactly one of caller and thread closes the run.
        with self.lock:
            self.closed = self.closed or (self.thread is not None and not self.ended)
            if self.closed:
                self.run_id, self.is_open = None, False
        return not self.closed

    def take_over(self) -> Tracker:
        """Drain and return a tracker for the caller: another one where the thread still blocks in this one."""
        if self.drain():
            return self.tracker
        log.warning("the tracking server is slow: metrics go to a separate run")
        return self.reopen() if self.reopen is not None else NoTracker()

    def abandon(self) -> None:
        """Close a run that will not be published as failed; unsent metrics are dropped."""
        # Emptied first, so that `drain` waits only for the call in progress.
        with suppress(queue.Empty):
            while True:
                self.pending.get_nowait()
        if self.drain(seconds=ABANDON_SECONDS) and self.is_open:
            self.is_open = False
            try:
                self.tracker.finish(is_failed=True)
            except LikenessError as error:
                log.warning("the tracking run stays open: %s", error)

    def _work(self) -> None:
        while (job := self.pending.get()) is not None and not self.closed:
            try:
                job()
            except Exception as error:  # a failure of the tracking server must not end the training
                log.warning("tracking call failed: %s", error)
        with self.lock:
            self.ended = True
        if self.closed:  # `drain` timed out, so this thread closes the run that it opened
            try:
                self.tracker.finish(is_failed=True)
            except Exception as error:
                log.warning("a tracking run stays open: %s", error)
