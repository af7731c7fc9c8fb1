"""S3 policies: what the store requests is granted, on its own prefix, and nothing more."""

import ast
import fnmatch
import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from boto3.s3.transfer import TransferConfig

from flows.cli.maintenance import gc
from flows.cli.maintenance.gc import list_stale_uploads
from tasks.services.config import StoreConfig
from tasks.services.store import s3
from tasks.services.store.s3 import S3Store

POLICIES = Path(__file__).resolve().parents[2] / "deployments/policies"
# The permissions that S3 asks for, by operation; a condition such as If-None-Match needs no other.
PERMISSIONS = {
    "HeadBucket": "s3:ListBucket",
    "ListObjectsV2": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
}
# Operations by method of boto3's client. Transfers split large files, and abort an upload that fails.
OPERATIONS = {
    "head_bucket": {"HeadBucket"},
    "put_object": {"PutObject"},
    "get_object": {"GetObject"},
    "head_object": {"HeadObject"},
    "delete_object": {"DeleteObject"},
    "list_objects_v2": {"ListObjectsV2"},
    "list_multipart_uploads": {"ListMultipartUploads"},
    "abort_multipart_upload": {"AbortMultipartUpload"},
    "download_file": {"HeadObject", "GetObject"},
    "upload_file": {
        "PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "AbortMultipartUpload",
    },
}  # fmt: skip
GARBAGE_COLLECTION = {"list_multipart_uploads", "abort_multipart_upload"}
"""What no worker calls."""
INDIRECT = {"get_paginator", "generate_presigned_url"}
"""Methods that name their operation in the first argument."""


@dataclass(frozen=True)
class Request:
    """One request that boto3 sent."""

    operation: str
    parameters: dict[str, Any]


def called_methods() -> set[str]:
    """Return every method that the store calls on its client."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(s3))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if ast.unparse(node.func.value) != "self.client":
            continue
        name = node.func.attr
        found.add(ast.literal_eval(node.args[0]) if name in INDIRECT else name)
    return found


def read_policy(name: str) -> list[dict[str, Any]]:
    policy = json.loads((POLICIES / f"{name}.json").read_text())
    assert policy["Version"] == "2012-10-17"
    statements: list[dict[str, Any]] = policy["Statement"]
    return statements


def as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def granted(name: str) -> set[str]:
    return {action for rule in read_policy(name) if rule["Effect"] == "Allow" for action in as_list(rule["Action"])}


def is_allowed(name: str, request: Request) -> bool:
    """Evaluate a policy's allowing statements as IAM does, for requests over TLS."""
    parameters = request.parameters
    resource = "arn:aws:s3:::BUCKET" + (f"/{parameters['Key']}" if "Key" in parameters else "")
    context = {"s3:prefix": parameters["Prefix"]} if "Prefix" in parameters else {}
    for rule in read_policy(name):
        is_match = PERMISSIONS[request.operation] in as_list(rule["Action"]) and any(
            fnmatch.fnmatchcase(resource, pattern) for pattern in as_list(rule["Resource"])
        )
        if rule["Effect"] == "Allow" and is_match and meets(rule.get("Condition", {}), context):
            return True
    return False


def meets(condition: dict[str, dict[str, str]], context: dict[str, str]) -> bool:
    checks: dict[str, Callable[[str, str], bool]] = {
        "StringLike": lambda key, pattern: key in context and fnmatch.fnmatchcase(context[key], pattern),
        "Null": lambda key, value: (key not in context) == (value == "true"),
    }
    return all(checks[kind](key, value) for kind, pairs in condition.items() for key, value in pairs.items())


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The S3 requests of clients that are made from here on."""
    requests: list[Request] = []
    make = boto3.client

    def record(params: dict[str, Any], model: Any, **_: object) -> None:
        requests.append(Request(model.name, dict(params)))

    def make_recording(*args: Any, **kwargs: Any) -> Any:
        client = make(*args, **kwargs)
        client.meta.events.register("provide-client-params.s3", record)
        return client

    monkeypatch.setattr(boto3, "client", make_recording)
    return requests


def test_the_worker_policy_grants_exactly_what_the_store_calls() -> None:
    operations = {operation for method in called_methods() - GARBAGE_COLLECTION for operation in OPERATIONS[method]}
    assert {PERMISSIONS[operation] for operation in operations} == granted("worker")


def test_no_policy_grants_an_action_by_wildcard_or_on_the_whole_bucket() -> None:
    for path in POLICIES.glob("*.json"):
        for rule in read_policy(path.stem):
            if rule["Effect"] == "Deny":
                continue
            assert not any("*" in action for action in as_list(rule["Action"])), path.name
            for resource in as_list(rule["Resource"]):
                assert resource in {"arn:aws:s3:::BUCKET", "arn:aws:s3:::BUCKET/likeness/*"}, path.name
            if as_list(rule["Action"]) == ["s3:ListBucket"]:
                assert rule["Condition"], path.name


def test_every_request_of_the_store_is_allowed_to_a_worker(
    s3_config: StoreConfig, sent: list[Request], tmp_path: Path
) -> None:
    store = S3Store(s3_config)
    large = tmp_path / "large"
    large.write_bytes(b"x" * (TransferConfig().multipart_threshold + 1))
    store.put_bytes("runs/a", b"1")
    assert store.put_if_absent("leases/a", b"1") and not store.put_if_absent("leases/a", b"2")
    store.put_file("models/large", large)
    store.get_file("models/large", tmp_path / "copy")
    assert store.find_bytes("runs/a") == b"1"
    assert store.find_bytes("runs/missing") is None
    assert store.compute_sha256("models/large")
    assert store.list_keys("runs/") == ["runs/a"]
    store.delete("runs/a")
    operations = {request.operation for request in sent}
    assert operations >= {"HeadBucket", "UploadPart", "CompleteMultipartUpload", "ListObjectsV2", "DeleteObject"}
    assert any(request.parameters.get("IfNoneMatch") == "*" for request in sent)
    assert [request for request in sent if not is_allowed("worker", request)] == []


def test_a_failed_upload_is_aborted_which_the_worker_policy_allows(
    s3_config: StoreConfig, sent: list[Request], tmp_path: Path
) -> None:
    store = S3Store(s3_config)
    large = tmp_path / "large"
    large.write_bytes(b"x" * (TransferConfig().multipart_threshold + 1))

    def fail(**_: object) -> None:
        raise ConnectionError("the network is gone")

    store.client.meta.events.register("before-send.s3.UploadPart", fail)
    with pytest.raises(ConnectionError):
        store.put_file("models/large", large)
    aborts = [request for request in sent if request.operation == "AbortMultipartUpload"]
    assert aborts and all(is_allowed("worker", request) for request in aborts)


@pytest.mark.parametrize("name", ["worker", "reader", "gc"])
def test_another_prefix_of_the_bucket_is_out_of_reach(name: str) -> None:
    for operation in ("GetObject", "PutObject", "DeleteObject"):
        assert not is_allowed(name, Request(operation, {"Key": "elsewhere/secret"}))
    assert not is_allowed(name, Request("ListObjectsV2", {"Prefix": "elsewhere/"}))
    assert is_allowed(name, Request("ListObjectsV2", {"Prefix": "likeness/runs/"}))


def test_a_reader_writes_nothing_and_garbage_collection_only_deletes() -> None:
    assert granted("reader") == {"s3:GetObject", "s3:ListBucket"}
    removing = {"s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListBucketMultipartUploads"}
    assert granted("gc") == granted("reader") | removing


def test_abandoned_uploads_are_listed_and_aborted_which_the_gc_policy_allows(
    s3_config: StoreConfig, sent: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store(s3_config.model_copy(update={"prefix": "likeness"}))
    for key in ("likeness/models/a", "likeness/models/b", "elsewhere/c"):
        store.client.create_multipart_upload(Bucket=store.bucket, Key=key)
    begun = {upload.key: upload.begun for upload in store.list_uploads()}
    assert set(begun) == {"models/a", "models/b"}
    with monkeypatch.context() as patch:  # moto dates every upload to 2010
        patch.setattr(gc, "UPLOAD_AGE", time.time())
        assert list(list_stale_uploads(store)) == []  # younger ones may be in progress
    sent.clear()
    for item in list(list_stale_uploads(store)):
        gc.remove(item, store)
    assert store.list_uploads() == []
    assert {request.operation for request in sent} == {"ListMultipartUploads", "AbortMultipartUpload"}
    assert all(is_allowed("gc", request) for request in sent)
    left = store.client.list_multipart_uploads(Bucket=store.bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["elsewhere/c"]


def test_every_policy_denies_unencrypted_connections() -> None:
    for path in POLICIES.glob("*.json"):
        denied = [rule for rule in read_policy(path.stem) if rule["Effect"] == "Deny"]
        assert [rule["Condition"] for rule in denied] == [{"Bool": {"aws:SecureTransport": "false"}}], path.name
