"""Objects in an S3 bucket, through boto3."""

import base64
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.services.config import StoreConfig, find_cache
from tasks.services.store.base import StoredObject, Upload, check_key
from tasks.services.store.object_cache import ObjectCache
from tasks.stage.digests import digest_file

log = logging.getLogger(__name__)
FIRST_ATTEMPTS = 3
"""Of the first request of all."""
SHA256_METADATA = "sha256"
PROBE = "leases/conditional-write-probe"
NO_CONDITIONS = (
    "only they (If-None-Match) keep two runs from overwriting each other; use a store that supports them, "
    "such as AWS S3 or SeaweedFS"
)

BAD_CREDENTIALS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")
ACTIONS = {
    "HeadObject": "GetObject",  # without ListBucket, a missing object is denied too
    "HeadBucket": "ListBucket",
    "ListObjectsV2": "ListBucket",
    "ListMultipartUploads": "ListBucketMultipartUploads",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
}
"""The permission of each operation that has another name."""


def make_client(config: StoreConfig, *, max_attempts: int) -> Any:
    """Return boto3's client of a bucket's endpoint."""
    import boto3
    from botocore.config import Config

    # Explicit timeouts and attempts: boto3's default read timeout is 60 s.
    return boto3.client(
        "s3",
        endpoint_url=config.endpoint_url,
        region_name=config.region,
        config=Config(
            connect_timeout=10,
            read_timeout=30,
            retries={"mode": "standard", "total_max_attempts": max_attempts},
            request_checksum_calculation=config.request_checksums,
            response_checksum_validation=config.request_checksums,
            s3={"addressing_style": config.addressing_style},
        ),
    )


class S3Store:
    """Objects in an S3 bucket; credentials come from boto3's default chain."""

    def __init__(self, config: StoreConfig) -> None:
        from boto3.s3.transfer import TransferConfig

        if not config.bucket:
            raise ConfigError("store.bucket is empty; name the bucket, for example store.bucket=my-bucket")
        self.bucket = config.bucket
        self.prefix = config.prefix.strip("/")
        self.has_checksums = config.request_checksums == "when_supported"
        self.client = make_client(config, max_attempts=config.max_attempts)
        rate = config.max_upload_rate
        self.transfer = TransferConfig(max_bandwidth=None if rate is None else max(1, round(rate * 1e6)))
        self.has_conditional_writes = False
        self.cache = open_cache(config)
        # Wrong credentials or bucket names fail here, not at the first write after an expensive stage; a wrong address
        # fails soon, while an outage in the middle of a run is waited out.
        with self._translated(f"bucket {self.bucket}"):
            first = make_client(config, max_attempts=min(FIRST_ATTEMPTS, config.max_attempts))
            first.head_bucket(Bucket=self.bucket)

    def _name(self, key: str) -> dict[str, str]:
        key = check_key(key)
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{key}" if self.prefix else key}

    def _translated(self, what: str, *, is_write: bool = False) -> "_Translated":
        """Return a context that maps errors of a request for a key, a prefix or the bucket."""
        folder = f"{self.prefix}/{what}".rpartition("/")[0].lstrip("/") if not what.startswith("bucket ") else ""
        return _Translated(what, f"s3://{self.bucket}/{folder}".rstrip("/"), is_write=is_write)

    def put_bytes(self, key: str, data: bytes) -> None:
        with self._translated(key, is_write=True):
            self.client.put_object(**self._name(key), Body=data, **self._checksum(data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if not self.has_conditional_writes:
            self.check_conditional_writes()
        return self._put_new(key, data)

    def check_conditional_writes(self) -> None:
        """Raise ConfigError where the store takes a conditional write for a plain one: no lease would hold."""
        # The first write creates the object, in the bucket's first run; one of the two must be refused.
        if self._put_new(PROBE, b"probe") and self._put_new(PROBE, b"probe"):
            raise ConfigError(f"the store of bucket {self.bucket} ignores conditional writes; {NO_CONDITIONS}")
        self.has_conditional_writes = True

    def _put_new(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        for is_last in (False, False, True):
            try:
                with self._translated(key, is_write=True):
                    self.client.put_object(**self._name(key), Body=data, IfNoneMatch="*", **self._checksum(data))
            except ServiceUnavailable as error:
                cause = error.__cause__
                status = _status(cause) if isinstance(cause, ClientError) else 0
                if status == 412:  # the object exists: another's, or our own where the answer of an attempt was lost
                    return _was_retried(cause) and key != PROBE and self.find_bytes(key) == data
                if status in (400, 501) and key == PROBE:
                    raise ConfigError(f"{error}; {NO_CONDITIONS}") from error
                # 409: another write or a delete of the key was under way, so it has to be asked again.
                if status != 409 or is_last:
                    raise
            else:
                return True
        raise AssertionError("unreachable")

    def put_file(self, key: str, path: Path) -> None:
        with self._translated(key, is_write=True):
            # `upload_file` splits large files into parts; the digest of the whole goes into the metadata.
            extra = {"Metadata": {SHA256_METADATA: digest_file(path)}}
            self.client.upload_file(str(path), **self._name(key), ExtraArgs=extra, Config=self.transfer)

    def find_bytes(self, key: str, *, sha256: str = "") -> bytes | None:
        if self.cache and sha256 and (kept := self.cache.find(sha256)) is not None:
            return kept
        with self._translated(key):
            data: bytes = self.client.get_object(**self._name(key))["Body"].read()
            if self.cache and sha256 == hashlib.sha256(data).hexdigest():
                self.cache.add(sha256, data)
            return data
        return None  # reached where _translated suppressed a missing object

    def get_file(self, key: str, path: Path, *, sha256: str = "") -> None:
        if self.cache and sha256 and self.cache.get_file(sha256, path):
            return
        with self._translated(key):
            self.client.download_file(Filename=str(path), **self._name(key))
            if self.cache and sha256 and sha256 == digest_file(path):
                self.cache.add(sha256, path)
            return
        raise ServiceUnavailable(f"object {key} is not in bucket {self.bucket}")

    def keep(self, sha256: str, source: bytes | Path) -> None:
        if self.cache:
            self.cache.add(sha256, source)

    def compute_sha256(self, key: str) -> str | None:
        with self._translated(key):
            stored = self._find_stored_sha256(key)
            if stored:
                return stored
            hasher = hashlib.sha256()  # written by another tool without a digest, so it has to be read
            for chunk in self.client.get_object(**self._name(key))["Body"].iter_chunks(1 << 20):
                hasher.update(chunk)
            return hasher.hexdigest()
        return None

    def _checksum(self, data: bytes) -> dict[str, Any]:
        """Return arguments that store the digest, and make S3 verify the upload where it supports checksums."""
        sha256 = hashlib.sha256(data)
        arguments: dict[str, Any] = {"Metadata": {SHA256_METADATA: sha256.hexdigest()}}
        if self.has_checksums:
            arguments["ChecksumSHA256"] = base64.b64encode(sha256.digest()).decode()
        return arguments

    def _find_stored_sha256(self, key: str) -> str:
        """Return an object's SHA-256 from its metadata, without reading it; empty where there is none."""
        mode = {"ChecksumMode": "ENABLED"} if self.has_checksums else {}
        head = self.client.head_object(**self._name(key), **mode)
        checksum = head.get("ChecksumSHA256")
        if checksum and head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT" and "-" not in checksum:
            return base64.b64decode(checksum).hex()
        # A multipart upload has a checksum of part checksums; the object's own digest is in its metadata.
        return str(head.get("Metadata", {}).get(SHA256_METADATA, ""))

    def list_keys(self, prefix: str) -> list[str]:
        return [item.key for item in self.list_objects(prefix)]

    def list_objects(self, prefix: str) -> list[StoredObject]:
        return sorted(self._iter_objects(prefix), key=lambda item: item.key)

    def _iter_objects(self, prefix: str) -> Iterator[StoredObject]:
        cut = len(self.prefix) + 1 if self.prefix else 0
        full = f"{self.prefix}/{prefix}" if self.prefix else prefix
        with self._translated(prefix):
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=full):
                for item in page.get("Contents", ()):
                    yield StoredObject(item["Key"][cut:], int(item["Size"]), item["LastModified"].timestamp())

    def delete(self, key: str) -> None:
        with self._translated(key):
            self.client.delete_object(**self._name(key))

    def list_uploads(self) -> list[Upload]:
        cut = len(self.prefix) + 1 if self.prefix else 0
        found: list[Upload] = []
        with (
            self._translated("uploads"),
            _optional_operation(
                "it does not list unfinished uploads: let a lifecycle rule remove them (AbortIncompleteMultipartUpload)"
            ),
        ):
            pages = self.client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix=f"{self.prefix}/" if self.prefix else ""):
                for item in page.get("Uploads", ()):
                    found.append(Upload(item["Key"][cut:], item["UploadId"], item["Initiated"].timestamp()))
        return found

    def abort_upload(self, upload: Upload) -> None:
        with self._translated(upload.key):
            self.client.abort_multipart_upload(**self._name(upload.key), UploadId=upload.upload_id)

    def presign(self, key: str, *, seconds: int) -> str:
        # Signed locally, without a request: a missing object is noticed by whoever fetches the URL.
        url: str = self.client.generate_presigned_url("get_object", Params=self._name(key), ExpiresIn=seconds)
        return url

    def describe(self, key: str) -> str:
        name = self._name(key)
        return f"s3://{name['Bucket']}/{name['Key']}"


def open_cache(config: StoreConfig) -> ObjectCache | None:
    """Return the cache of a bucket's objects; None without one."""
    if not config.folder or not config.cache_gb:
        return None
    return ObjectCache(find_cache(config.folder), round(config.cache_gb * 1e9))


class _Translated:
    """Map boto3's errors to ours; a missing object ends the block without an error."""

    def __init__(self, what: str, place: str, *, is_write: bool) -> None:
        self.what = what
        self.place = place
        self.is_write = is_write  # then a missing bucket is an error, and no missing object

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        if isinstance(error, NoCredentialsError):
            raise ConfigError(
                "S3 needs credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            ) from error
        # A transfer of a file raises an error of its own around the server's.
        cause = error.__context__ if isinstance(error, Boto3Error) else error
        if isinstance(cause, ClientError):
            # A HEAD response has no body, so botocore takes the bare status, `404`, as its code.
            code = str(cause.response.get("Error", {}).get("Code"))
            if code in ("NoSuchKey", "404") and not self.is_write:
                if self.what.startswith("bucket "):
                    raise ConfigError(f"{self.what} does not exist; create it or set store.bucket") from error
                return True
            if code in ("AccessDenied", "403"):
                raise ConfigError(self._explain_denial(str(cause.operation_name))) from error
            if code in BAD_CREDENTIALS:
                raise ConfigError(
                    f"S3 refuses the credentials for {self.place}: {code}; check the AWS_ variables"
                ) from error
            raise ServiceUnavailable(f"S3 refused {self.what}: {error}") from cause
        if isinstance(error, BotoCoreError | Boto3Error):
            raise ServiceUnavailable(f"S3 did not answer for {self.what}: {error}") from error
        return False

    def _explain_denial(self, operation: str) -> str:
        action = ACTIONS.get(operation, operation)
        needed = f"s3:{action} and s3:ListBucket" if action == "GetObject" else f"s3:{action}"
        # The answer to HEAD has no body, which would tell.
        hint = ", or the keys are wrong" if operation.startswith("Head") else ""
        return (
            f"S3 denies {operation} below {self.place}: the credentials need {needed} there{hint} "
            "(deployments/policies has policies)"
        )


@contextmanager
def _optional_operation(consequence: str) -> Iterator[None]:
    """Log what follows where a store lacks an operation."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if _status(error) != 501:
            raise
        log.warning("the store lacks an operation: %s", consequence)


def _was_retried(error: Any) -> bool:
    return int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)) > 0


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
