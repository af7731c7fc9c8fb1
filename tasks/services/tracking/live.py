"""A tracking run that is fed while a stage is at work, from a thread of its own: a slow server holds up nothing."""

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
    """Makes another tracker of the same server, for when the thread still hangs in a call of this one."""
    closed: bool = False
    """Whether waiting for the thread ended in vain: the tracker stays the thread's."""
    ended: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, *, tags: dict[str, str], stale_tag: str, datasets: Sequence[DatasetInfo]) -> None:
        """Open the run and mark earlier ones with the same `stale_tag` that were never closed; returns at once."""
        if self.thread is not None:
            return

        def open_run() -> None:
            self.tracker.close_stale(tag=stale_tag, value=tags[stale_tag])
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
        """Send metrics as they come; what can't be sent now is sent when the run is published."""
        if self.thread is None or self.closed:
            return
        kept = list(rows)

        def send() -> None:
            if self.is_open:
                self.tracker.log_metrics(kept)
                self.logged.update((name, step) for name, _, step in kept)

        self.pending.put(send)

    def drain(self, *, seconds: float | None = None) -> bool:
        """Wait until everything was sent or has failed; return whether the tracker is the caller's from here on."""
        if self.thread is not None and self.thread.is_alive() and not self.closed:
            self.pending.put(None)
            self.thread.join(LONGEST_WAIT_SECONDS if seconds is None else seconds)
        with self.lock:
            self.closed = self.closed or (self.thread is not None and not self.ended)
            if self.closed:
                self.run_id, self.is_open = None, False
        return not self.closed

    def take_over(self) -> Tracker:
        """Drain and return the tracker to go on with: another one where the thread still uses this one."""
        if self.drain():
            return self.tracker
        log.warning("the tracking server is slow: the curves are sent to a run of their own")
        return self.reopen() if self.reopen is not None else NoTracker()

    def abandon(self) -> None:
        """Close a run that will not be published; what was not sent yet is dropped."""
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
            except Exception as error:  # training must not end because a server does
                log.warning("tracking is behind: %s", error)
        with self.lock:
            self.ended = True
        if self.closed:  # nobody else closes what this thread opened too late
            try:
                self.tracker.finish(is_failed=True)
            except Exception as error:
                log.warning("a tracking run stays open: %s", error)
