"""Errors of providers: each says what failed, why by the server's own words, and what to do next."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import LikenessError
from tasks.redaction import registered
from tasks.services.llm.agents.conversation import Conversation
from tasks.services.llm.config import CapabilityConfig
from tasks.services.llm.doctor import examine
from tests.support.llm import GOOD, ask, make_llm
from tests.support.llm_batch import ask_in_batch
from tests.support.llm_server import ScriptedServer, completion, scripted_server
from tests.support.llm_stream import say, stream

CANARY = "sk-canary-7f3a9b2c4d5e6f"


@pytest.fixture
def keyed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    monkeypatch.setenv("SOME_KEY", CANARY)
    yield {"api_key_variable": "SOME_KEY"}
    registered.discard(CANARY)


def fail(server: ScriptedServer, folder: Path, status: int, reason: str = "because", **changes: Any) -> str:
    wait = changes.pop("wait", "0")
    server.script((status, {"retry-after": wait}, json.dumps({"error": {"message": reason}}).encode()))
    with pytest.raises(LikenessError) as caught:
        ask(make_llm(server, folder, max_attempts=1, **changes))
    return str(caught.value)


@pytest.mark.parametrize("status", [401, 403])
def test_an_auth_error_without_a_key_names_the_setting(server: ScriptedServer, tmp_path: Path, status: int) -> None:
    message = fail(server, tmp_path, status)
    assert "None" not in message
    assert "set api_key_variable" in message


@pytest.mark.parametrize("status", [401, 403])
def test_an_auth_error_contains_the_reason_of_the_server_and_the_key_variable(
    server: ScriptedServer, tmp_path: Path, keyed: dict[str, str], status: int
) -> None:
    message = fail(server, tmp_path, status, "model access is not enabled for this project", **keyed)
    assert "model access is not enabled for this project" in message
    assert "SOME_KEY" in message


def test_a_rate_limit_error_names_the_wait_and_the_setting(server: ScriptedServer, tmp_path: Path) -> None:
    message = fail(server, tmp_path, 429, "too many requests", wait="600")
    assert "asks to wait 600 s" in message
    assert "too many requests" in message
    assert "requests_per_minute" in message


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_error_says_what_to_do_next(server: ScriptedServer, tmp_path: Path, status: int) -> None:
    assert "run again later to resume, or choose another LLM profile" in fail(server, tmp_path, status)


def test_a_missing_batch_endpoint_is_not_reported_as_a_missing_model(server: ScriptedServer, tmp_path: Path) -> None:
    server.batch_api = None  # type: ignore[assignment]
    with pytest.raises(LikenessError) as caught:
        ask_in_batch(make_llm(server, tmp_path))
    assert "does not serve" not in str(caught.value)
    assert "/v1/batches" in str(caught.value)


def test_doctor_reports_a_rejected_key(server: ScriptedServer, tmp_path: Path, keyed: dict[str, str]) -> None:
    server.script((401, {}, b'{"error": {"message": "expired"}}'))
    found = list(examine(make_llm(server, tmp_path, **keyed), "p"))
    assert [(finding.name, finding.is_good) for finding in found] == [
        ("retirement", True), ("models", True), ("key", False),
    ]  # fmt: skip
    assert "expired" in found[-1].detail


def test_doctor_tests_the_declared_response_format(server: ScriptedServer, tmp_path: Path) -> None:
    server.script('{"color": "red"}')
    able = CapabilityConfig(response_format="json_schema", tools=False, streaming=False, images=())
    found = {finding.name: finding for finding in examine(make_llm(server, tmp_path, capabilities=able), "p")}
    assert not found["response format"].is_good
    assert "set .capabilities.response_format=auto" in found["response format"].detail


ECHOES = {
    "whole": CANARY,
    "truncated": f"{CANARY[:12]}...",
    "in Base64": "c2stY2FuYXJ5LTdmM2E5YjJjNGQ1ZTZm",
    "its tail": f"...{CANARY[-10:]}",
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES.keys())
@pytest.mark.parametrize("where", ["error", "refusal", "reasoning", "model", "doctor", "stream"])
def test_an_api_key_echoed_by_the_server_is_masked_and_never_stored(
    server: ScriptedServer, tmp_path: Path, keyed: dict[str, str], echo: str, where: str
) -> None:
    said = f"key {echo} seen"
    whole = completion(GOOD)
    if where == "error":
        server.script((400, {}, json.dumps({"error": {"message": said}}).encode()))
    elif where == "stream":
        server.script(stream(*({"content": piece} for piece in (said[:9], said[9:15], said[15:]))))
    else:
        whole["choices"][0]["message"] |= {"refusal": said} if where == "refusal" else {"reasoning_content": said}
        whole |= {"model": f"asked-model {echo}"} if where == "model" else {}
        server.script((200, {}, json.dumps(whole).encode()))
    llm = make_llm(server, tmp_path, **keyed)
    shown: list[str] = []
    if where == "doctor":
        shown += [finding.detail for finding in examine(llm, "p")]
    elif where == "stream":
        Conversation(llm, "reviewer", "be brief").say("hi", on_text=shown.append)
    else:
        try:
            shown.append(ask(llm).model_dump_json())
        except LikenessError as error:
            shown.append(str(error))
    secret = echo.strip(".")
    assert secret not in "".join(shown)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_control_characters_of_a_streamed_reply_never_reach_the_terminal(tmp_path: Path) -> None:
    shown: list[str] = []
    with scripted_server() as server:
        server.script(say("a\x1b", "[31mred\x1b", "]0;title\x07 b\u202e", "\x9b2J", " done\r\n"))
        Conversation(make_llm(server, tmp_path), "reviewer", "be brief").say("hi", on_text=shown.append)
    text = "".join(shown)
    assert text.replace("\n", "").isprintable()
    assert "done" in text


def test_control_characters_of_a_non_streamed_reply_are_stripped(tmp_path: Path) -> None:
    shown: list[str] = []
    with scripted_server() as server:
        server.script("red\x1b[31m\x07\x9b2J")
        plain = CapabilityConfig(response_format="json_schema", streaming=False)
        llm = make_llm(server, tmp_path, capabilities=plain)
        Conversation(llm, "reviewer", "be brief").say("hi", on_text=shown.append)
    assert "".join(shown).isprintable()
