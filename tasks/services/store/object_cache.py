"""Local copies of a bucket's objects, found by their SHA-256 and bounded in size."""

import contextlib
import hashlib
import os
import shutil
import threading
from pathlib import Path

from tasks.errors import StorageFull
from tasks.services.store.local import READ_ONLY, link_or_copy
from tasks.stage.digests import digest_file
from tasks.stage.files import PART_PREFIX, staged_file

KEPT_SHARE = 0.9
"""Of the bound, after the least recently used copies were removed: not one for each new one."""
RESCAN_SHARE = 0.05
"""Of the bound, after which the folder is read again: other processes add to it too."""
LARGEST_SHARE = 0.5
"""Of the bound, that one object may take."""


class ObjectCache:
    """Copies of objects in a folder, shared by all processes of a machine; each is verified whenever it is used."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.lock = threading.Lock()
        self.size: int | None = None
        """Bytes in the folder when it was last read; None before that."""
        self.added = 0
        """Bytes that this process has added since."""

    def find(self, sha256: str) -> bytes | None:
        """Return an object's content; a damaged copy is removed."""
        path = self.folder / sha256
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != sha256:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        touch(path)
        return data

    def get_file(self, sha256: str, path: Path) -> bool:
        """Copy or hard-link an object to a file, which must not be modified; return whether it was there."""
        own = self.folder / sha256
        try:
            if digest_file(own) != sha256:
                own.unlink(missing_ok=True)
                return False
            touch(own)
            link_or_copy(own, path)
        except OSError:
            return False
        return True

    def add(self, sha256: str, source: bytes | Path) -> None:
        """Keep a copy, where it can be kept: without one, the object is read from the bucket."""
        target = self.folder / sha256
        with contextlib.suppress(OSError, StorageFull):
            num_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
            if num_bytes > LARGEST_SHARE * self.max_bytes or target.exists():
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with staged_file(target, size_bytes=num_bytes) as staged:
                # A copy, no hard link: the file's owner may change its mode, or write to it.
                if isinstance(source, bytes):
                    staged.write_bytes(source)
                else:
                    shutil.copyfile(source, staged)
            target.chmod(READ_ONLY)  # it may be linked to others' files
            self.make_room(num_bytes)

    def make_room(self, added: int) -> None:
        """Remove the least recently used copies where the folder is too large."""
        with self.lock:
            self.added += added
            if self.size is not None and self.added < RESCAN_SHARE * self.max_bytes:
                return
            self.added = 0
            files = sorted(self.list_copies())  # other processes add and remove too
            self.size = sum(num_bytes for _, num_bytes, _ in files)
            if self.size <= self.max_bytes:
                return
            for _, num_bytes, path in files:
                if self.size <= KEPT_SHARE * self.max_bytes:
                    return
                path.unlink(missing_ok=True)
                self.size -= num_bytes

    def list_copies(self) -> list[tuple[float, int, Path]]:
        """Return when each copy was last used, its size and its path."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith(PART_PREFIX):  # another process is writing it
                    continue
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    found.append((stat.st_mtime, stat.st_size, Path(entry.path)))
        return found


def touch(path: Path) -> None:
    """Mark a copy as used now."""
    with contextlib.suppress(OSError):
        os.utime(path)
