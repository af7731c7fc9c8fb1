"""What tests of the subject stage share."""

from pathlib import Path

import pytest

from tasks.services.store.local import LocalStore
from tasks.subject.photos.ingest import CheckedPhotos
from tests.support.subject import take_photos


@pytest.fixture
def photos(tmp_path: Path, store: LocalStore) -> CheckedPhotos:
    """Four photos that passed the checks."""
    return take_photos(tmp_path / "in", store)
