"""Progress of long stages: bars on a terminal, lines elsewhere."""

import logging
import os
import sys
import threading
import time
from typing import Protocol, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 10.0


class ProgressView(Protocol):
    """Shows the progress of a run's parts; called from several threads."""

    def update(self, name: str, done: int, total: int, *, detail: str = "") -> None:
        """Report that `done` of `total` items of a part are finished."""

    def note(self, text: str) -> None:
        """Print one line of text."""

    def close(self) -> None:
        """Stop showing."""


class LineSchedule:
    """When a part's next line is due: at its beginning and end, and every few seconds between."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.last_printed: dict[str, float] = {}
        self.lock = threading.Lock()

    def take(self, name: str, done: int, total: int) -> bool:
        """Return whether a line is due, which then counts as printed."""
        now = time.monotonic()
        with self.lock:
            last = self.last_printed.get(name)
            if last is not None and now - last < self.seconds and done < total:
                return False
            if last is not None and last == float("inf"):
                return False
            # Infinity marks a part as finished, so that repeated last updates print one line.
            self.last_printed[name] = float("inf") if done >= total else now
        return True


def format_line(name: str, done: int, total: int, *, detail: str = "") -> str:
    """Return progress as one line."""
    return f"{name}: {done}/{total}{'  ' + detail if detail else ''}"


class LineProgress:
    """One line at the beginning and end of a part, and every ten seconds between."""

    def __init__(self) -> None:
        self.schedule = LineSchedule(LINE_EVERY_SECONDS)

    def update(self, name: str, done: int, total: int, *, detail: str = "") -> None:
        """Print a line if it is time for one."""
        if self.schedule.take(name, done, total):
            self.note(format_line(name, done, total, detail=detail))

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing: lines need no cleanup."""


class BarProgress:
    """One bar per part."""

    def __init__(self) -> None:
        self.view = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[detail]}"),
            console=Console(stderr=True),
        )
        self.tasks: dict[str, TaskID] = {}
        self.lock = threading.Lock()
        self.view.start()

    def update(self, name: str, done: int, total: int, *, detail: str = "") -> None:
        """Update a part's bar, which is added with its first update."""
        # Without the lock, two threads could each add a bar of this name.
        with self.lock:
            if name not in self.tasks:
                self.tasks[name] = self.view.add_task(name, total=total, detail="")
        self.view.update(self.tasks[name], completed=done, total=total, detail=detail)  # rich takes its own lock

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self.view.console.print(text, highlight=False, markup=False)  # brackets in messages are not rich's tags

    def close(self) -> None:
        """Leave the bars as they are."""
        self.view.stop()


def make_progress() -> ProgressView:
    """Return bars on a terminal, lines elsewhere."""
    return BarProgress() if sys.stderr.isatty() else LineProgress()


class DetachableOutput:
    """A stream that outlives its reader: its output is dropped once nobody reads it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.drop()
            return len(text)

    def flush(self) -> None:
        """Flush what was written, or drop it."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.drop()

    def drop(self) -> None:
        """Let the descriptor lead nowhere: what the stream has buffered, and libraries write, goes there too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def outlive_reader() -> None:
    """Let this process go on where whoever reads its output is gone.

    The worker of a deployment reads it through a pipe: killed, it would take the run with it by a BrokenPipeError.
    """
    before = (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = map(detachable, before)
    loggers = [each for each in list(logging.root.manager.loggerDict.values()) if isinstance(each, logging.Logger)]
    for handler in {handler for each in (logging.root, *loggers) for handler in each.handlers}:
        # Handlers keep the stream that they began with.
        if isinstance(handler, logging.StreamHandler) and handler.stream in before:
            handler.setStream(detachable(handler.stream))
            # Prefect's writes through a console of rich, which ends the process where nobody reads.
            if isinstance(console := getattr(handler, "console", None), Console):
                console.file = handler.stream


def detachable(stream: TextIO) -> TextIO:
    """Return a stream as one that outlives its reader."""
    return stream if isinstance(stream, DetachableOutput) else cast(TextIO, DetachableOutput(stream))
