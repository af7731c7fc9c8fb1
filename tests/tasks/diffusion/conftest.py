"""Tiny models of every family, made once."""

from pathlib import Path

import pytest

from tests.support.tiny_families import MAKERS


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A diffusers folder per family."""
    return {family: make(tmp_path_factory.mktemp(family) / "model") for family, make in MAKERS.items()}
