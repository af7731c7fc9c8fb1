"""What servers do wrong: each fault ends in a clear error, within its time, with requests counted at the server."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.errors import BudgetExceeded, ConfigError, LikenessError, ReplyInvalid, ServiceUnavailable
from tests.support.llm import CHAT, GOOD, SPEC, WHOLE, ask, make_llm
from tests.support.llm_server import ScriptedServer, completion

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


@contextmanager
def raw_server(behave: Callable[[socket.socket, int], None]) -> Iterator[ScriptedServer]:
    """Serve sockets by a rule that HTTP libraries would not allow; it gets the socket and its number."""
    listener = socket.create_server(("127.0.0.1", 0))
    told = ScriptedServer()
    told.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            told.counts[CHAT] += 1
            read_request(connection)
            threading.Thread(target=behave, args=(connection, told.counts[CHAT]), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield told
    listener.close()


def read_request(connection: socket.socket) -> None:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(
        next(line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
    )
    while len(body) < length:
        body += connection.recv(65536)


def then_well(fault: Callable[[socket.socket], None]) -> Callable[[socket.socket, int], None]:
    """Do a fault on the first connection and answer on the others."""

    def behave(connection: socket.socket, number: int) -> None:
        if number == 1:
            fault(connection)
        else:
            connection.sendall(HEAD % len(WHOLE) + WHOLE)
        connection.close()

    return behave


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


def reset_in_body(connection: socket.socket) -> None:
    connection.sendall(HEAD % len(WHOLE) + WHOLE[: len(WHOLE) // 2])
    time.sleep(0.05)
    reset(connection)


@pytest.mark.parametrize("fault", [reset, reset_in_body], ids=["before the body", "in the body"])
def test_a_broken_connection_is_retried(tmp_path: Path, fault: Callable[[socket.socket], None]) -> None:
    with raw_server(then_well(fault)) as server:
        assert ask(make_llm(server, tmp_path)).grade == 2
        assert server.counts[CHAT] == 2


@pytest.mark.parametrize("retry_after", ["soon", "nan", "-5", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_an_unusable_retry_after_falls_back_to_the_default_backoff(
    server: ScriptedServer, tmp_path: Path, retry_after: str
) -> None:
    server.script((429, {"retry-after": retry_after}, b"{}"), GOOD)
    started = time.monotonic()
    assert ask(make_llm(server, tmp_path)).grade == 2
    assert server.counts[CHAT] == 2
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("status", "body", "error", "asked"),
    [
        (403, b"{}", ConfigError, 1),
        (402, b"{}", BudgetExceeded, 1),
        (429, b'{"error": {"message": "You exceeded your current quota, check billing"}}', BudgetExceeded, 1),
        (429, b'{"error": {"message": "Slow down", "code": "insufficient_quota"}}', BudgetExceeded, 1),
        (502, b"<html>bad gateway</html>", ServiceUnavailable, 3),
        (200, b"<html>not JSON</html>", ServiceUnavailable, 3),
        (200, b"[]", ServiceUnavailable, 3),
        (200, WHOLE[: len(WHOLE) // 2], ServiceUnavailable, 3),
    ],
)
def test_each_status_and_body_maps_to_its_error_and_number_of_attempts(
    server: ScriptedServer, tmp_path: Path, status: int, body: bytes, error: type[Exception], asked: int
) -> None:
    server.script((status, {"retry-after": "0"}, body))
    with pytest.raises(error) as caught:
        ask(make_llm(server, tmp_path))
    assert "\n" not in str(caught.value)
    assert server.counts[CHAT] == asked


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, b'{"error": {"message": "no such field: reasoning"}}', ConfigError),
        (422, b'{"detail": "no such field: reasoning"}', ConfigError),
        (400, b'{"error": "no such field: reasoning"}', ConfigError),
        (500, b'{"error": {"message": "no such field: reasoning"}}', ServiceUnavailable),
    ],
)
def test_the_error_contains_the_message_of_the_server(
    server: ScriptedServer, tmp_path: Path, status: int, body: bytes, error: type[Exception]
) -> None:
    server.script((status, {}, body))
    with pytest.raises(error, match="no such field: reasoning"):
        ask(make_llm(server, tmp_path, max_attempts=1))


def test_an_unresponsive_server_times_out(tmp_path: Path) -> None:
    with raw_server(lambda connection, number: time.sleep(30)) as server:
        started = time.monotonic()
        with pytest.raises(ServiceUnavailable, match="does not answer"):
            ask(make_llm(server, tmp_path, timeout_seconds=1, max_attempts=1))
        assert time.monotonic() - started < 10
        assert server.counts[CHAT] == 1


def test_a_dripping_response_times_out(tmp_path: Path) -> None:
    def drip(connection: socket.socket, number: int) -> None:
        connection.sendall(HEAD % len(WHOLE))
        for byte in WHOLE:
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                return
            time.sleep(0.2)

    with raw_server(drip) as server:
        started = time.monotonic()
        with pytest.raises(ServiceUnavailable, match="was incomplete after 1 s"):
            ask(make_llm(server, tmp_path, timeout_seconds=1, max_attempts=1))
        assert time.monotonic() - started < 10
        assert server.counts[CHAT] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": []}, "empty"),
        ({"refusal": "no"}, "refused"),
        ({"finish_reason": "content_filter"}, "filter"),
        ({"finish_reason": "length"}, "cut off"),
    ],
)
def test_empty_refused_filtered_and_truncated_replies_have_distinct_errors(
    server: ScriptedServer, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    server.script((200, {}, json.dumps(completion(None if "refusal" in changes else GOOD, **changes)).encode()))
    with pytest.raises(ReplyInvalid, match=message):
        ask(make_llm(server, tmp_path))
    assert server.counts[CHAT] == 2


def test_a_model_retired_mid_run_is_named_and_earlier_replies_stay_cached(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script(GOOD, (404, {}, b'{"error": {"message": "The model has been deprecated"}}'))
    llm = make_llm(server, tmp_path)
    assert ask(llm).grade == 2
    from dataclasses import replace

    with pytest.raises(ConfigError, match="does not serve asked-model"):
        llm.ask(replace(SPEC, repeat=1), role="judge")
    assert ask(make_llm(server, tmp_path)).grade == 2
    assert server.counts[CHAT] == 2


@pytest.mark.parametrize("status", [400, 401, 500])
def test_the_api_key_is_never_written_to_errors_logs_or_files(
    server: ScriptedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    canary = "sk-canary-91d2"
    monkeypatch.setenv("SOME_KEY", canary)
    told = f'{{"error": {{"message": "bad key {canary}"}}}}'.encode()
    server.script((500, {"retry-after": "0"}, b"{}"), (status, {"retry-after": "0"}, told))
    with caplog.at_level(logging.DEBUG), pytest.raises(LikenessError) as caught:
        ask(make_llm(server, tmp_path, api_key_variable="SOME_KEY"))
    assert canary not in str(caught.value)
    assert canary not in caplog.text
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or canary.encode() not in path.read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from tasks.services.llm.service import LlmService
from tasks.services.llm.config import CapabilityConfig, PriceConfig, ProfileConfig
from tests.support.config import make_llm_config
from tasks.services.llm.budget.spending_cap import Budget
from tasks.services.llm.budget.ledger import Ledger
from tasks.services.store.local import LocalStore
from tasks.services.llm.chat.request import RequestSpec
from pydantic import BaseModel

class Reply(BaseModel):
    grade: int

SPEC = RequestSpec("be brief", ("grade this",), Reply)
url, folder, moment = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
able = CapabilityConfig(response_format="json_schema")
prices = PriceConfig(input=1.0, output=10.0, date="d")
profile = ProfileConfig(base_url=url, model="asked-model", capabilities=able, prices=prices)
store, ledger = LocalStore(folder / "store"), Ledger(folder / "ledger.jsonl")
budget = Budget(folder / "budget.json", 1.0)
llm = LlmService(make_llm_config(models=("p",), profiles={"p": profile}), store=store, ledger=ledger, budget=budget)
plain = {"store": store.put_bytes, "record": ledger.record}

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "before the reply is stored":
    store.put_bytes = die
elif moment == "before it is recorded":
    ledger.record = die
print(llm.ask(SPEC, role="judge").reply.grade)
"""


@pytest.mark.parametrize(("moment", "asked"), [("before the reply is stored", 2), ("before it is recorded", 1)])
def test_a_process_killed_after_the_reply_was_cached_does_not_pay_again(
    server: ScriptedServer, tmp_path: Path, moment: str, asked: int
) -> None:
    server.script(GOOD)
    script = tmp_path / "ask.py"
    script.write_text(KILLED)
    root = Path(__file__).resolve().parents[4]

    def run(moment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script), server.url, str(tmp_path), moment], check=False, text=True,
            capture_output=True, env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip

    assert run(moment).returncode == -signal.SIGKILL
    again = run("never")
    assert (again.returncode, again.stdout.strip()) == (0, "2"), again.stderr
    assert server.counts[CHAT] == asked
    spent = json.loads((tmp_path / "budget.json").read_text())["spent_usd"]
    assert spent == pytest.approx(asked * (100 * 1.0 + 20 * 10.0) / 1e6)  # the cap knows of every reply
