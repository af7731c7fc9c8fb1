"""The embedded Prefect server: several runs of one folder begin at once."""

import threading
from pathlib import Path

import pytest

from flows.cli.run.prefect_server import EmbeddedServer


def test_a_new_database_is_migrated_by_one_server_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / ".prefect"))
    monkeypatch.setenv("PREFECT_API_URL", "")  # set by `start`, and restored after the test
    first, second = EmbeddedServer(tmp_path), EmbeddedServer(tmp_path)
    first.start()
    other = threading.Thread(target=second.start)
    try:
        other.start()
        other.join(1)
        assert first.process is not None
        assert second.process is None  # it waits until the first one answers or is stopped
        first.stop()
        other.join()
        assert second.process is not None
    finally:
        first.stop()
        second.stop()
