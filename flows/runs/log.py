"""Progress of a run in Prefect: log lines and progress artifacts in the UI, beside what a terminal shows."""

import logging
import threading
import time
import uuid

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

from tasks.stage.progress import LineSchedule, ProgressView, format_line, make_progress, outlive_reader

UPDATE_SECONDS = 5.0
LOG_SECONDS = 30.0


class LoggedProgress:
    """Shows progress where the process runs, and in the UI of the server that knows the run."""

    def __init__(self, view: ProgressView) -> None:
        self.view = view
        self.log: logging.Logger | logging.LoggerAdapter[logging.Logger] = get_run_logger()
        self.artifacts: dict[str, uuid.UUID] = {}
        self.updated: dict[str, float] = {}
        self.schedule = LineSchedule(LOG_SECONDS)
        self.lock = threading.Lock()

    def update(self, name: str, done: int, total: int, *, detail: str = "") -> None:
        """Update the bar, log a line now and then, and update the artifact at most every few seconds.

        A slow server must not slow the run: log lines are sent by a thread of Prefect's.
        """
        self.view.update(name, done, total, detail=detail)
        if self.schedule.take(name, done, total):
            self.log.info("%s", format_line(name, done, total, detail=detail))
        with self.lock:
            now = time.monotonic()
            if done < total and now - self.updated.get(name, float("-inf")) < UPDATE_SECONDS:
                return
            self.updated[name] = now
        try:
            percent = 100.0 * done / max(1, total)
            if name in self.artifacts:
                update_progress_artifact(self.artifacts[name], percent, description=f"{done} of {total}  {detail}")
            else:
                key = name.replace(" ", "-").replace("_", "-").lower()
                created = create_progress_artifact(percent, key=f"progress-{key}", description=name)
                assert isinstance(created, uuid.UUID)  # a coroutine only within an event loop
                self.artifacts[name] = created
        except Exception as error:  # the server may be gone for a while; the run does not depend on it
            logging.getLogger(__name__).debug("progress of %s was not shown: %s", name, error)

    def note(self, text: str) -> None:
        """Print one line and log it."""
        self.view.note(text)
        self.log.info("%s", text)

    def close(self) -> None:
        """Stop showing."""
        self.view.close()


def make_run_progress() -> ProgressView:
    """Return progress that Prefect shows too, where this is a flow run."""
    outlive_reader()
    view = make_progress()
    return view if FlowRunContext.get() is None else LoggedProgress(view)
