"""A tracking run that is fed while a stage is at work, from a thread of its own: a slow server holds up nothing."""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tasks.errors import LikenessError
from tasks.services.tracking import DatasetInfo, Tracker

log = logging.getLogger(__name__)
Row = tuple[str, float, int]
LONGEST_WAIT_SECONDS = 60.0


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

    def begin(self, *, tags: dict[str, str], stale_tag: str, datasets: Sequence[DatasetInfo]) -> None:
        """Open the run and mark earlier ones with the same `stale_tag` that were never closed; returns at once."""
        if self.thread is not None:
            return

        def open_run() -> None:
            self.tracker.close_stale(tag=stale_tag, value=tags[stale_tag])
            self.run_id = self.tracker.start(name=self.name, params=self.params, tags={**self.tags, **tags})
            self.is_open = True
            self.tracker.log_datasets(datasets)

        self.pending.put(open_run)
        self.thread = threading.Thread(target=self._work, name="live-tracking", daemon=True)
        self.thread.start()

    def log_metrics(self, rows: Iterable[Row]) -> None:
        """Send metrics as they come; what can't be sent now is sent when the run is published."""
        if self.thread is None:
            return
        kept = list(rows)

        def send() -> None:
            if self.is_open:
                self.tracker.log_metrics(kept)
                self.logged.update((name, step) for name, _, step in kept)

        self.pending.put(send)

    def drain(self) -> None:
        """Wait until everything was sent or has failed; from here on the tracker is the caller's."""
        if self.thread is not None and self.thread.is_alive():
            self.pending.put(None)
            self.thread.join(LONGEST_WAIT_SECONDS)

    def abandon(self) -> None:
        """Close a run that will not be published."""
        self.drain()
        if self.is_open:
            self.is_open = False
            try:
                self.tracker.finish(is_failed=True)
            except LikenessError as error:
                log.warning("the tracking run stays open: %s", error)

    def _work(self) -> None:
        while (job := self.pending.get()) is not None:
            try:
                job()
            except Exception as error:  # training must not end because a server does
                log.warning("tracking is behind: %s", error)
