"""A Prefect server that the tests of the stack share."""

from collections.abc import Iterator

import pytest
from prefect.client.orchestration import SyncPrefectClient

from tests.support.cli_sandbox import serve_prefect


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    with serve_prefect(tmp_path_factory.mktemp("prefect")) as url, SyncPrefectClient(url) as client:
        yield client
