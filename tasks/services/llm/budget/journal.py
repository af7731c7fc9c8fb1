"""Append-only files of lines, synced line by line."""

import os
from pathlib import Path


def append_line(path: Path, line: bytes) -> None:
    """Append one line and fsync it. A torn last line of an earlier crash is ended first, so it costs only itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
