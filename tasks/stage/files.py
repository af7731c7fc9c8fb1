"""Files that exist whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.errors import StorageFull

PART_PREFIX = ".part-"


@contextmanager
def staged_file(target: Path, *, size_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary file beside the target; sync it and rename it into place at the end.

    Staged in the destination's own folder: a rename across mounts would be a copy, which can be cut off.

    Raises:
        StorageFull: there is no room; names the path and the missing size. Nothing is left behind.

    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=PART_PREFIX)
    os.close(handle)
    staged = Path(name)
    try:
        with explain_full_disk(target, size_bytes=size_bytes):
            yield staged
            staged.chmod(0o644)  # mkstemp makes files that only their owner reads
            sync(staged)
            os.replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)


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
    """Turn "no space left" and "quota exceeded" into one line that names path and needed size."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        shown = error.filename if error.filename and path.is_dir() else path
        needed = f"{size_bytes / 1e6:.1f} MB for " if size_bytes else ""
        raise StorageFull(
            f"no room left: {needed}{shown} ({error.strerror}); free space (`likeness gc` lists what can go) "
            "or set output_dir, then run again to resume"
        ) from error


def quarantine(path: Path) -> Path:
    """Move a damaged file aside, so that it is kept for inspection and never read again."""
    aside = path.with_name(f"{path.name}.quarantined")
    while aside.is_dir():  # only a file can be replaced
        aside = aside.with_name(f"{aside.name}.quarantined")
    os.replace(path, aside)
    return aside
