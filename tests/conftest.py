"""Shared fixtures: real tiny parts, loopback only."""

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
# One thread per pytest-xdist process: spinning threads would starve those of the other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tasks.services.config import StoreConfig
from tasks.services.store.base import Store
from tasks.services.store.local import LocalStore
from tasks.services.store.s3 import S3Store
from tests.support import layers
from tests.support.cli_sandbox import CliSandbox, make_sandbox
from tests.support.config import make_config
from tests.support.tiny import make_tiny_stable_diffusion


def refuse_remote(event: str, args: tuple[object, ...]) -> None:
    """Fail a test that would talk to another machine."""
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = str(args[1][0])
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise PermissionError(f"tests talk to loopback only, not to {host}")


sys.addaudithook(refuse_remote)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with its layer, and order the tests."""
    layers.assign(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share tests out by file; all tests that need a whole run stay in one process."""
    return layers.make_scheduler(config, log)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """An empty store in a folder."""
    return LocalStore(tmp_path / "store")


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder of the true architecture with random weights, 32 px."""
    return make_tiny_stable_diffusion(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A moto server on a free loopback port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_config(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> StoreConfig:
    """A bucket of its own for a test."""
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    bucket = f"bucket-{abs(hash(request.node.nodeid))}"
    boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1").create_bucket(Bucket=bucket)
    return make_config(StoreConfig, kind="s3", folder="", bucket=bucket, endpoint_url=s3_endpoint)


@pytest.fixture(params=["local", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Each kind of store in turn: both pass the same tests."""
    if request.param == "local":
        return LocalStore(tmp_path / "store")
    return S3Store(request.getfixturevalue("s3_config"))


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CliSandbox]:
    """A folder with a space in its name and a running Prefect server."""
    with make_sandbox(tmp_path_factory.mktemp("work")) as made:
        yield made


@pytest.fixture(scope="session")
def first_run(sandbox: CliSandbox) -> dict[str, Any]:
    """The summary of the first run of the quick demo."""
    return sandbox.run_first()
