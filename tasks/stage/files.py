"""Atomic file writes."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tasks.errors import StorageFull

PART_PREFIX = ".part-"


def identify_host() -> str:
    """Return what names the processes that this one can see: containers may share a host's name, not its processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux alone has both
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


HOST = identify_host()
OWNED_PART = re.compile(rf"{re.escape(PART_PREFIX)}{HOST}-(\d+)-.+")


def make_part_prefix() -> str:
    """Return how names of this process's temporary files begin: `remove_stale_parts` tells by it whose they are."""
    return f"{PART_PREFIX}{HOST}-{os.getpid()}-"


def remove_stale_parts(root: Path) -> None:
    """Remove the temporary files and folders below a folder whose process, on this host, was killed."""
    for folder, folders, names in os.walk(root):  # unlike `rglob`, it tolerates folders that vanish
        for name in [*folders, *names]:
            owner = OWNED_PART.fullmatch(name)
            if owner is None or is_running(int(owner[1])):
                continue
            path = Path(folder, name)
            if name in folders:
                folders.remove(name)
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie does no work any more."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        # Of another user, where /proc hides it: its id is taken nevertheless.
        return bool(psutil.pid_exists(pid))


@contextmanager
def staged_file(target: Path, *, size_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary file beside the target; fsync it and rename it into place at the end.

    Staged in the target's own folder, since a rename works within one file system only.

    Raises:
        StorageFull: there is no room; names the path and the needed size. No partial file is left behind.

    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=make_part_prefix())
    os.close(handle)
    staged = Path(name)
    try:
        with explain_full_disk(target, size_bytes=size_bytes):
            yield staged
            staged.chmod(0o644)  # mkstemp creates files with mode 0600
            # Content before name, so that a power cut never leaves the name of an empty file. The folder is not
            # synced: the rename itself may be lost, which leaves the old file.
            sync(staged)
            os.replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)  # gone already where the rename succeeded


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace a file's content in one step. Raises StorageFull."""
    content = data.encode() if isinstance(data, str) else data
    with staged_file(path, size_bytes=len(content)) as staged:
        staged.write_bytes(content)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def explain_full_disk(path: Path, *, size_bytes: int | None = None) -> Iterator[None]:
    """Map ENOSPC, EDQUOT and EFBIG to StorageFull, which names the path and the needed size."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        shown = error.filename if error.filename and path.is_dir() else path  # a folder: name the file within it
        needed = f"{size_bytes / 1e6:.1f} MB for " if size_bytes else ""
        raise StorageFull(
            f"no room left: {needed}{shown} ({error.strerror}); free space (`likeness gc` lists what can go) "
            "or set output_dir, then run again to resume"
        ) from error


def quarantine(path: Path) -> Path:
    """Rename a damaged file or folder to `<name>.quarantined`, kept for inspection, and return the new path."""
    aside = path.with_name(f"{path.name}.quarantined")
    while aside.is_dir():  # os.replace overwrites a file, but not a folder
        aside = aside.with_name(f"{aside.name}.quarantined")
    os.replace(path, aside)
    return aside
