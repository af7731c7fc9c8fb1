"""A sandbox that no other test shares: what runs of others left behind would be taken for what a killed run left."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.cli_sandbox import CliSandbox, make_sandbox


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CliSandbox]:
    with make_sandbox(tmp_path_factory.mktemp("faults")) as made:
        yield made


@pytest.fixture(scope="module")
def first_run(sandbox: CliSandbox) -> dict[str, Any]:
    return sandbox.run_first()
