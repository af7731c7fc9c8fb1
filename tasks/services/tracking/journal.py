"""A run's tracking records in a file until the tracking server has them: numbered, sent in order, acknowledged.

A record keeps the time at which it was logged. MLflow identifies a metric by name, value, step and time, so one that
is sent again after a lost answer is stored once.
"""

import fcntl
import threading
import time
from collections import deque
from io import FileIO
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.errors import ArtifactCorrupt
from tasks.services.tracking.base import DatasetInfo, MetricRow
from tasks.stage.digests import dump_line, load_lines

COMPACT_BYTES = 1_000_000
JOURNAL_NAME = "mlflow-buffer.jsonl"
"""In a run's folder; it is removed when the server has everything."""


class Record(BaseModel):
    """One call to a tracking server, or the acknowledgement of one."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["start", "metrics", "finish", "sent"]
    number: int = 0
    """Of the record; of `sent`, the record that the server has."""
    at_ms: int = 0
    """Unix time in milliseconds."""
    server: str = ""
    """Where the run is tracked, without a password."""
    experiment: str = ""
    name: str = ""
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    stale_tag: str = ""
    datasets: tuple[DatasetInfo, ...] = ()
    rows: tuple[MetricRow, ...] = ()
    run_id: str | None = None


class Journal:
    """The records of one run. Without a path they are in memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.pending: deque[Record] = deque()
        self.run_id: str | None = None
        """Of the tracking run, where its start was acknowledged."""
        self.name = ""
        self.server = ""
        self.experiment = ""
        self.head_bytes = 0
        """Up to the acknowledgement of the start; 0: not yet."""
        self.count = 0
        self.lock = threading.Lock()
        self.file: FileIO | None = None
        self.is_torn = False
        """Whether the file ends in the middle of a line."""

    def open(self) -> bool:
        """Open the file and read what is in it; return whether no other process has it open."""
        if self.path is None or self.file is not None:
            return True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not buffered: what did not fit on a full disk would be written, and fail, again when it is closed.
        file = self.path.open("a+b", buffering=0)
        try:
            # The kernel releases it when the process dies, however it dies.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        self.file = file
        self._read(file)
        return True

    def _read(self, file: FileIO) -> None:
        """Read the records; a torn or damaged one costs only itself."""
        file.seek(0)
        data = file.read()
        self.is_torn = bool(data) and not data.endswith(b"\n")  # killed in the middle of a line
        for line in load_lines(data):
            try:
                record = None if line is None else Record.model_validate(line)
            except ValidationError:
                record = None
            if record is None:
                continue
            if record.kind == "sent":
                self.run_id = record.run_id or self.run_id
                while self.pending and self.pending[0].number <= record.number:
                    self.pending.popleft()
            else:
                if record.kind == "start":
                    self.name, self.server, self.experiment = record.name, record.server, record.experiment
                self.pending.append(record)
                self.count = max(self.count, record.number)

    def append(self, record: Record) -> None:
        """Add a record, with the next number, which is kept until it is acknowledged."""
        with self.lock:
            self.count += 1
            at_ms = record.at_ms or int(time.time() * 1000)
            numbered = record.model_copy(update={"number": self.count, "at_ms": at_ms})
            # The file first: what is in memory alone would be lost with the process.
            self._write(numbered)
            self.pending.append(numbered)

    def acknowledge(self, record: Record, *, run_id: str | None = None) -> None:
        """Forget the oldest record: the server has it."""
        with self.lock:
            self.run_id = run_id or self.run_id
            is_whole = self._write(Record(kind="sent", number=record.number, run_id=self.run_id))
            self.pending.popleft()
            if self.file is None or not is_whole:
                return
            size = self.file.tell()
            if record.kind == "start":
                self.head_bytes = size
            elif not self.pending and self.head_bytes and size > self.head_bytes + COMPACT_BYTES:
                self.file.truncate(self.head_bytes)  # to the start of the run; appending continues from there

    def _write(self, record: Record) -> bool:
        """Append a line; return whether all of it was. Not synced: power cuts are rarer than training steps."""
        if self.file is None:
            return False
        try:
            line = dump_line(record.model_dump(mode="json", exclude_defaults=True)).encode()
            line = b"\n" + line if self.is_torn else line
            self.is_torn = self.file.write(line) < len(line)
        except (OSError, ValueError, ArtifactCorrupt):
            # A full disk, or a value that is not finite: the record is kept in memory.
            return False
        return not self.is_torn

    def remove(self) -> None:
        """Close and delete the file: nothing is left to send."""
        if self.file is not None and self.path is not None:
            self.path.unlink(missing_ok=True)
            self.close()

    def close(self) -> None:
        """Close the file, which another process may then open."""
        if self.file is not None:
            self.file.close()
            self.file = None
