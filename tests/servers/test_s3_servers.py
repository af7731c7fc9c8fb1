"""The store's contract on S3 servers that others wrote: LocalBucket, and S3rver, which knows its keys."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

from flows.cli.maintenance.gc import list_stale_uploads
from tasks.errors import ConfigError
from tasks.services.config import StoreConfig
from tasks.services.store.s3 import S3Store
from tests.servers.served import SERVERS, find_port, need, serving
from tests.support.config import make_config
from tests.support.store_contract import CONDITIONAL, UNCONDITIONAL, Check, a_presigned_address_gives_the_object

HOW = "python -m tests.servers.install localbucket s3rver"
KEY = "S3RVER"
"""The one that S3rver knows; LocalBucket takes any."""
LOCALBUCKET, S3RVER = "localbucket", "s3rver"


@contextmanager
def serve(name: str, folder: Path) -> Iterator[str]:
    """Run a server and yield its address."""
    port = find_port()
    (folder / "data").mkdir()
    if name == LOCALBUCKET:
        program = need(SERVERS / LOCALBUCKET / "localbucket.py", HOW)
        command = [sys.executable, program, "--port", str(port), folder / "data"]
    else:
        program = need(SERVERS / S3RVER / "node_modules" / "s3rver" / "bin" / "s3rver.js", HOW)
        node = shutil.which("node") or pytest.skip("node is not there")
        command = [node, program, "-d", folder / "data", "-a", "127.0.0.1", "-p", str(port)]
        # A bucket to be ready with: without one, its root answers 403.
        command += ["--configure-bucket", "first", "--no-vhost-buckets"]
    url = f"http://127.0.0.1:{port}"
    with serving(command, ready=f"{url}/" if name == LOCALBUCKET else f"{url}/first", log=folder / "log"):
        yield url


@pytest.fixture(scope="module", params=[LOCALBUCKET, S3RVER])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The name and address of each server in turn."""
    with serve(request.param, tmp_path_factory.mktemp(request.param)) as url:
        yield request.param, url


@pytest.fixture
def config(server: tuple[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> StoreConfig:
    """A bucket of its own for a test."""
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, KEY)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it may have read the variables of other tests
    bucket = f"bucket-{abs(hash(request.node.nodeid))}"
    boto3.client("s3", endpoint_url=server[1], region_name="us-east-1").create_bucket(Bucket=bucket)
    return make_config(
        StoreConfig, kind="s3", bucket=bucket, endpoint_url=server[1], addressing_style="path", max_attempts=2
    )


@pytest.mark.parametrize(
    "check", [*UNCONDITIONAL, a_presigned_address_gives_the_object], ids=lambda check: check.__name__
)
def test_a_server_of_others_keeps_the_contract(config: StoreConfig, tmp_path: Path, check: Check) -> None:
    check(S3Store(config), tmp_path)


@pytest.mark.parametrize("check", CONDITIONAL, ids=lambda check: check.__name__)
def test_conditional_writes_hold_or_their_absence_is_found_before_the_first(
    server: tuple[str, str], config: StoreConfig, tmp_path: Path, check: Check
) -> None:
    store = S3Store(config)
    if server[0] == LOCALBUCKET:
        check(store, tmp_path)
        return
    with pytest.raises(ConfigError, match=r"ignores conditional writes; .*If-None-Match"):
        store.put_if_absent("once", b"1")
    assert store.find_bytes("once") is None


def test_a_wrong_key_is_one_error(
    server: tuple[str, str], config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if server[0] == LOCALBUCKET:
        pytest.skip("LocalBucket doesn't look at keys")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "WRONG")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it has read the variables
    with pytest.raises(
        ConfigError, match=f"S3 denies HeadBucket below s3://{config.bucket}: .*, or the keys are wrong"
    ):
        S3Store(config)


def test_garbage_collection_works_where_unfinished_uploads_are_not_listed(
    config: StoreConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(list_stale_uploads(S3Store(config))) == []
    assert "AbortIncompleteMultipartUpload" in caplog.text
