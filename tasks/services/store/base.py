"""Object stores behind one protocol: a local folder, and S3 through boto3.

Keys are `/`-separated paths. A write is all or nothing: readers see the old object or the new.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from tasks.errors import ConfigError


@dataclass(frozen=True)
class StoredObject:
    """One object in a listing."""

    key: str
    size_bytes: int
    modified: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Upload:
    """An upload in parts that was begun and neither completed nor aborted."""

    key: str
    upload_id: str
    begun: float
    """Seconds since 1970."""


class Store(Protocol):
    """The interface of object stores."""

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store an object, replacing any older one."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store an object only where there is none, atomically; return whether it was stored."""

    def put_file(self, key: str, path: Path) -> None:
        """Store a file's content."""

    def find_bytes(self, key: str, *, sha256: str = "") -> bytes | None:
        """Return an object's content, or None; with its SHA-256, a local copy will do."""

    def get_file(self, key: str, path: Path, *, sha256: str = "") -> None:
        """Copy or hard-link an object to a file, which must not be modified; with its SHA-256, a local copy will do.

        Raises ServiceUnavailable if missing.
        """

    def keep(self, sha256: str, source: bytes | Path) -> None:
        """Keep a local copy of what was stored, for reads that name its SHA-256; a folder needs none."""

    def compute_sha256(self, key: str) -> str | None:
        """Return the SHA-256 of the stored object, or None where there is none."""

    def list_keys(self, prefix: str) -> list[str]:
        """Return all keys below a prefix, sorted."""

    def list_objects(self, prefix: str) -> "list[StoredObject]":
        """Return all objects below a prefix with their sizes and ages, sorted by key."""

    def delete(self, key: str) -> None:
        """Remove an object; removing none is not an error."""

    def list_uploads(self) -> "list[Upload]":
        """Return the unfinished uploads of this store; a folder has none."""

    def abort_upload(self, upload: "Upload") -> None:
        """Discard the parts of an upload; one that is gone is not an error."""

    def presign(self, key: str, *, seconds: int) -> str:
        """Return a URL by which anybody can read an object for `seconds`. Raises ConfigError if unsupported."""

    def describe(self, key: str) -> str:
        """Return an object's path or URI for messages."""


def check_key(key: str) -> str:
    """Return a key. Raises ConfigError for one that could leave the store's root."""
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts or not key or "\\" in key:
        raise ConfigError(f"object key {key!r} is not a plain relative path")
    return key
