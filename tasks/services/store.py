"""Object stores behind one protocol: a local folder, and S3 through boto3.

Keys are `/`-separated paths. A write is all or nothing: readers see the old object or the new.
"""

import base64
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.services.config import StoreConfig
from tasks.stage.digests import digest_file
from tasks.stage.files import PART_PREFIX, explain_full_disk, quarantine, staged_file, write_atomic

SHA256_METADATA = "sha256"
READ_ONLY = 0o444  # a file may have several names: a person who edits one of them in place must not change the others


@dataclass(frozen=True)
class StoredObject:
    """One object as a listing has it."""

    key: str
    size_bytes: int
    modified: float
    """Seconds since 1970."""


class Store(Protocol):
    """What the pipeline asks of an object store."""

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store an object, replacing any older one."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Store an object only where there is none; say whether it was stored."""

    def put_file(self, key: str, path: Path) -> None:
        """Store a file's content."""

    def find_bytes(self, key: str) -> bytes | None:
        """Return an object's content, or None."""

    def get_file(self, key: str, path: Path) -> None:
        """Copy an object to a file."""

    def compute_sha256(self, key: str) -> str | None:
        """Return the digest of what is stored now, or None."""

    def list_keys(self, prefix: str) -> list[str]:
        """Return all keys below a prefix, sorted."""

    def list_objects(self, prefix: str) -> "list[StoredObject]":
        """Return all objects below a prefix with their sizes and ages, sorted by key."""

    def delete(self, key: str) -> None:
        """Remove an object; removing none is not an error."""

    def presign(self, key: str, *, seconds: int) -> str:
        """Return an address under which anybody can read an object for a while. Raises ConfigError."""

    def describe(self, key: str) -> str:
        """Return an address that a person can open."""


def open_store(config: StoreConfig) -> Store:
    """Return the configured store. Raises ConfigError if it cannot be written."""
    if config.kind == "local":
        return LocalStore(Path(config.folder))
    return S3Store(config)


def check_key(key: str) -> str:
    """Refuse keys that could leave the store's root."""
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts or not key or "\\" in key:
        raise ConfigError(f"object key {key!r} is not a plain relative path")
    return key


class LocalStore:
    """Objects as files below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.hashed: dict[str, tuple[tuple[int, ...], str]] = {}
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"cannot write to {self.root}: {reason}; set output_dir or store.folder") from error

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.root / check_key(key)

    def free_path(self, key: str) -> Path:
        """Return the file of a key to be written; a folder that somebody put in its place is moved aside."""
        path = self.path(key)
        if path.is_dir() and not path.is_symlink():
            quarantine(path)
        return path

    def put_bytes(self, key: str, data: bytes) -> None:
        write_atomic(self.free_path(key), data)

    def put_new(self, key: str, data: bytes) -> bool:
        target = self.free_path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=PART_PREFIX)
        try:
            with explain_full_disk(target, size_bytes=len(data)), os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(name, target)  # atomic, and fails where the object exists
        except FileExistsError:
            return False
        finally:
            os.unlink(name)
        return True

    def put_file(self, key: str, path: Path) -> None:
        target = self.free_path(key)
        with staged_file(target, size_bytes=path.stat().st_size) as staged:
            link_or_copy(path, staged)
        target.chmod(READ_ONLY)

    def find_bytes(self, key: str) -> bytes | None:
        try:
            return self.path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def get_file(self, key: str, path: Path) -> None:
        try:
            with explain_full_disk(path):
                link_or_copy(self.path(key), path)
        except FileNotFoundError as error:
            raise ServiceUnavailable(f"object {key} is not in {self.root}") from error

    def compute_sha256(self, key: str) -> str | None:
        path = self.path(key)
        try:
            status = path.stat()
            mark = (status.st_size, status.st_mtime_ns, status.st_ino)
            if self.hashed.get(key, ((), ""))[0] != mark:  # read once per run, then known by size and time
                self.hashed[key] = (mark, digest_file(path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        return self.hashed[key][1]

    def list_keys(self, prefix: str) -> list[str]:
        if ".." in PurePosixPath(prefix).parts or prefix.startswith("/"):
            raise ConfigError(f"object prefix {prefix!r} is not a plain relative path")
        folder = self.root / PurePosixPath(prefix).parent
        paths = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(PART_PREFIX))
        keys = (p.relative_to(self.root).as_posix() for p in paths)
        return sorted(key for key in keys if key.startswith(prefix))

    def list_objects(self, prefix: str) -> list[StoredObject]:
        found = []
        for key in self.list_keys(prefix):
            with contextlib.suppress(FileNotFoundError):
                status = self.path(key).stat()
                found.append(StoredObject(key, status.st_size, status.st_mtime))
        return found

    def delete(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def presign(self, key: str, *, seconds: int) -> str:
        raise ConfigError("pictures=presigned needs a bucket: set store=s3, or pictures=inline for the LLM profile")

    def describe(self, key: str) -> str:
        return str(self.path(key))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name where both lie on one disk: a model of gigabytes stands there once.

    Objects are replaced, never written into, so that two names can't change each other.
    """
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


class S3Store:
    """Objects in an S3 bucket; credentials come from boto3's usual places."""

    def __init__(self, config: StoreConfig) -> None:
        import boto3
        from botocore.config import Config

        if not config.bucket:
            raise ConfigError("store.bucket is empty; name the bucket, for example store.bucket=my-bucket")
        self.bucket = config.bucket
        self.prefix = config.prefix.strip("/")
        self.has_checksums = config.request_checksums == "when_supported"
        # Timeouts and attempts are explicit: boto3's own wait a minute per read.
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=config.endpoint_url,
            region_name=config.region,
            config=Config(
                connect_timeout=10,
                read_timeout=30,
                retries={"mode": "standard", "total_max_attempts": 5},
                request_checksum_calculation=config.request_checksums,
                response_checksum_validation=config.request_checksums,
            ),
        )
        with _translated(f"bucket {self.bucket}"):
            self.client.head_bucket(Bucket=self.bucket)

    def _name(self, key: str) -> dict[str, str]:
        key = check_key(key)
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{key}" if self.prefix else key}

    def put_bytes(self, key: str, data: bytes) -> None:
        with _translated(key):
            self.client.put_object(**self._name(key), Body=data, **self._checksum(data))

    def put_new(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        try:
            with _translated(key):
                self.client.put_object(**self._name(key), Body=data, IfNoneMatch="*", **self._checksum(data))
        except ServiceUnavailable as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and _status(cause) in (409, 412):
                return False
            raise
        return True

    def put_file(self, key: str, path: Path) -> None:
        with _translated(key):
            extra = {"Metadata": {SHA256_METADATA: digest_file(path)}}
            self.client.upload_file(str(path), **self._name(key), ExtraArgs=extra)

    def find_bytes(self, key: str) -> bytes | None:
        with _translated(key):
            data: bytes = self.client.get_object(**self._name(key))["Body"].read()
            return data
        return None

    def get_file(self, key: str, path: Path) -> None:
        with _translated(key):
            self.client.download_file(Filename=str(path), **self._name(key))
            return
        raise ServiceUnavailable(f"object {key} is not in bucket {self.bucket}")

    def compute_sha256(self, key: str) -> str | None:
        with _translated(key):
            stored = self._find_stored_sha256(key)
            if stored:
                return stored
            hasher = hashlib.sha256()  # somebody else's object: only reading it tells
            for chunk in self.client.get_object(**self._name(key))["Body"].iter_chunks(1 << 20):
                hasher.update(chunk)
            return hasher.hexdigest()
        return None

    def _checksum(self, data: bytes) -> dict[str, Any]:
        """Return the arguments by which the bucket checks what arrives and keeps its digest."""
        sha256 = hashlib.sha256(data)
        arguments: dict[str, Any] = {"Metadata": {SHA256_METADATA: sha256.hexdigest()}}
        if self.has_checksums:
            arguments["ChecksumSHA256"] = base64.b64encode(sha256.digest()).decode()
        return arguments

    def _find_stored_sha256(self, key: str) -> str:
        """Return the digest that the bucket keeps of an object, without reading it; nothing where it keeps none."""
        mode = {"ChecksumMode": "ENABLED"} if self.has_checksums else {}
        head = self.client.head_object(**self._name(key), **mode)
        checksum = head.get("ChecksumSHA256")
        if checksum and head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT" and "-" not in checksum:
            return base64.b64decode(checksum).hex()
        # Several parts have a digest of digests; the object's own was noted when it was written.
        return str(head.get("Metadata", {}).get(SHA256_METADATA, ""))

    def list_keys(self, prefix: str) -> list[str]:
        return [item.key for item in self.list_objects(prefix)]

    def list_objects(self, prefix: str) -> list[StoredObject]:
        return sorted(self._iter_objects(prefix), key=lambda item: item.key)

    def _iter_objects(self, prefix: str) -> Iterator[StoredObject]:
        cut = len(self.prefix) + 1 if self.prefix else 0
        full = f"{self.prefix}/{prefix}" if self.prefix else prefix
        with _translated(prefix):
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=full):
                for item in page.get("Contents", ()):
                    yield StoredObject(item["Key"][cut:], int(item["Size"]), item["LastModified"].timestamp())

    def delete(self, key: str) -> None:
        with _translated(key):
            self.client.delete_object(**self._name(key))

    def presign(self, key: str, *, seconds: int) -> str:
        url: str = self.client.generate_presigned_url("get_object", Params=self._name(key), ExpiresIn=seconds)
        return url

    def describe(self, key: str) -> str:
        name = self._name(key)
        return f"s3://{name['Bucket']}/{name['Key']}"


class _translated:  # noqa: N801 - reads as a statement
    """Turn boto3's errors into ours; a missing object ends the block quietly."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        if isinstance(error, NoCredentialsError):
            raise ConfigError(
                "S3 needs credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            ) from error
        if isinstance(error, ClientError):
            if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
                if self.what.startswith("bucket "):
                    raise ConfigError(f"{self.what} does not exist; create it or set store.bucket") from error
                return True
            raise ServiceUnavailable(f"S3 refused {self.what}: {error}") from error
        if isinstance(error, BotoCoreError | Boto3Error):
            raise ServiceUnavailable(f"S3 did not answer for {self.what}: {error}") from error
        return False


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
