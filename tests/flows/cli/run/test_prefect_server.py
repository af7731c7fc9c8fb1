"""The embedded Prefect server: several runs of one folder begin at once."""

import os
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli.run import prefect_server
from flows.cli.run.prefect_server import EmbeddedServer, needs_server, shared_server
from tasks.errors import ServiceUnavailable

# A server that ends slowly, answers once its file exists, and serves the inherited socket.
SLOW = """
import http.server, pathlib, signal, socket, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit()))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.02)
server.socket = socket.socket(fileno=int(sys.argv[2]))
server.server_activate()
server.serve_forever()
"""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], EmbeddedServer]:
    """Servers of one folder, which answer as soon as the file `ready` exists."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / ".prefect"))
    # Set by `start`, and restored after the test.
    monkeypatch.setenv("PREFECT_API_URL", "")
    for name in ("PREFECT_LOGGING_TO_API_ENABLED", "LIKENESS_EMBEDDED_SERVER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def guard(*words: str) -> list[str]:
        return [sys.executable, "-c", SLOW, str(tmp_path / "ready"), words[words.index("--fd") + 1]]

    monkeypatch.setattr(prefect_server, "guarded", guard)
    return lambda: EmbeddedServer(tmp_path)


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_next_server_starts_once_the_first_answers(make: Callable[[], EmbeddedServer], tmp_path: Path) -> None:
    first, second = make(), make()
    try:
        first.start()
        wait_until(lambda: first.process is not None)
        second.start()
        time.sleep(0.5)
        assert second.process is None
        (tmp_path / "ready").touch()
        first.wait()
        second.wait()
        assert first.url != second.url
        assert os.environ["PREFECT_API_URL"] == second.url
        for server in (first, second):  # both at once: the lock is held while a server starts alone
            urllib.request.urlopen(f"{server.url}/health", timeout=30).close()
    finally:
        first.stop()
        second.stop()
    assert first.process is not None
    assert second.process is not None
    assert [first.process.poll(), second.process.poll()] == [0, 0]


def test_the_next_server_waits_until_a_stopped_one_has_ended(make: Callable[[], EmbeddedServer]) -> None:
    first, second = make(), make()
    try:
        first.start()
        wait_until(lambda: first.process is not None)
        second.start()
        first.stop()
        assert first.process is not None
        assert first.process.poll() is not None
        wait_until(lambda: second.process is not None)
    finally:
        first.stop()
        second.stop()  # before it answers
    with pytest.raises(ServiceUnavailable, match="did not start"):
        second.wait()


def test_a_server_that_never_gets_its_turn_is_an_error(
    make: Callable[[], EmbeddedServer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prefect_server, "TURN_SECONDS", 1.0)
    monkeypatch.setattr(prefect_server, "NOTICE_SECONDS", 0.1)
    first, second = make(), make()
    try:
        first.start()
        wait_until(lambda: first.process is not None)
        second.start()
        with pytest.raises(ServiceUnavailable, match=r"did not start; see .*server.log"):
            second.wait()
        assert "waiting for the Prefect server of another run" in capsys.readouterr().err
    finally:
        first.stop()
        second.stop()


def test_commands_that_a_process_starts_share_one_server(
    make: Callable[[], EmbeddedServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ready").touch()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    before = dict(os.environ)
    assert needs_server()
    with shared_server(tmp_path):
        url = os.environ["PREFECT_API_URL"]  # which they inherit
        assert not needs_server()
        prefect_server.WITHOUT_PROXY.open(f"{url}/health", timeout=30).close()
        with shared_server(tmp_path):  # finds the configured one
            assert os.environ["PREFECT_API_URL"] == url
    assert dict(os.environ) == before
    with pytest.raises(OSError, match="refused"):
        prefect_server.WITHOUT_PROXY.open(f"{url}/health", timeout=30)
