"""What tests of LLM services share."""

from collections.abc import Iterator

import pytest

from tests.support.llm import GOOD
from tests.support.llm_server import ScriptedServer, scripted_server


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A server that answers well until it is scripted otherwise."""
    with scripted_server() as running:
        running.script(GOOD)
        yield running
