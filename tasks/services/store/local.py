"""Objects as files below one folder."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.services.store.base import StoredObject, Upload, check_key
from tasks.stage.digests import digest_file
from tasks.stage.files import PART_PREFIX, explain_full_disk, make_part_prefix, quarantine, staged_file, write_atomic

READ_ONLY = 0o444  # a file may have several hard links: an edit in place of one would change the others


class LocalStore:
    """Objects as files below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.hashed: dict[str, tuple[tuple[int, ...], str]] = {}
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # A real write: `mkdir` succeeds on an existing folder that can't be written to.
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"cannot write to {self.root}: {reason}; set output_dir or store.folder") from error

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.root / check_key(key)

    def free_path(self, key: str) -> Path:
        """Return the file of a key to be written; a folder in its place is quarantined."""
        path = self.path(key)
        if path.is_dir() and not path.is_symlink():
            quarantine(path)
        return path

    def put_bytes(self, key: str, data: bytes) -> None:
        write_atomic(self.free_path(key), data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        target = self.free_path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=make_part_prefix())
        try:
            with explain_full_disk(target, size_bytes=len(data)), os.fdopen(handle, "wb") as file:
                os.fchmod(handle, 0o644)  # as other objects: mkstemp creates files with mode 0600
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(name, target)  # atomic create-if-absent: unlike a rename, it fails where the object exists
        except FileExistsError:
            return False
        finally:
            os.unlink(name)
        return True

    def put_file(self, key: str, path: Path) -> None:
        target = self.free_path(key)
        with staged_file(target, size_bytes=path.stat().st_size) as staged:
            link_or_copy(path, staged)
        # Mode bits belong to the inode: through a hard link, the source becomes read-only too.
        target.chmod(READ_ONLY)

    def find_bytes(self, key: str, *, sha256: str = "") -> bytes | None:
        try:
            return self.path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def get_file(self, key: str, path: Path, *, sha256: str = "") -> None:
        try:
            with explain_full_disk(path):
                link_or_copy(self.path(key), path)
        except FileNotFoundError as error:
            raise ServiceUnavailable(f"object {key} is not in {self.root}") from error

    def keep(self, sha256: str, source: bytes | Path) -> None:
        pass

    def compute_sha256(self, key: str) -> str | None:
        path = self.path(key)
        try:
            status = path.stat()
            mark = (status.st_size, status.st_mtime_ns, status.st_ino)
            # Hashed once per process, then trusted while size, mtime and inode stay the same.
            if self.hashed.get(key, ((), ""))[0] != mark:
                self.hashed[key] = (mark, digest_file(path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        return self.hashed[key][1]

    def list_keys(self, prefix: str) -> list[str]:
        if ".." in PurePosixPath(prefix).parts or prefix.startswith("/"):
            raise ConfigError(f"object prefix {prefix!r} is not a plain relative path")
        # As in S3, a prefix may end within a name: `a/b` lists `a/bc` too.
        folder = self.root / PurePosixPath(prefix).parent
        paths = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(PART_PREFIX))
        keys = (p.relative_to(self.root).as_posix() for p in paths)
        return sorted(key for key in keys if key.startswith(prefix))

    def list_objects(self, prefix: str) -> list[StoredObject]:
        found = []
        for key in self.list_keys(prefix):
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                status = self.path(key).stat()
                found.append(StoredObject(key, status.st_size, status.st_mtime))
        return found

    def delete(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def list_uploads(self) -> list[Upload]:
        return []

    def abort_upload(self, upload: Upload) -> None:
        raise ConfigError("a folder has no uploads in parts")

    def presign(self, key: str, *, seconds: int) -> str:
        raise ConfigError("image_urls=presigned needs a bucket: set store=s3, or image_urls=inline for the LLM profile")

    def describe(self, key: str) -> str:
        return str(self.path(key))


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file where both paths are on one file system, else copy it; models of gigabytes exist once.

    Objects are replaced, never modified in place, so the two names can't change each other.
    """
    # `os.link` refuses an existing target, and `staged_file` has created this one.
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:  # an OSError too, but a missing source can't be copied either
        raise
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
