"""Replies of unexpected shape: one parser, no traceback, and every paid reply is in the ledger."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import LikenessError, ReplyInvalid, ServiceUnavailable
from tasks.services.llm.agents.conversation import Conversation
from tasks.services.llm.agents.tools import Tool, ToolResult, ask_with_tools
from tasks.services.llm.agents.web_search import ask_with_search
from tasks.services.llm.config import CapabilityConfig, PriceConfig
from tasks.services.llm.doctor import examine
from tests.support.llm import CHAT, GOOD, SPEC, Reply, ask, make_llm
from tests.support.llm_server import ScriptedServer, completion
from tests.support.llm_stream import EVENTS, Word

PRICES = PriceConfig(input=1.0, output=10.0, date="2026-11-22")
NESTED = b"[" * 100_000 + b"]" * 100_000


def with_message(**changes: Any) -> dict[str, Any]:
    whole = completion(GOOD)
    whole["choices"][0]["message"] |= changes
    return whole


def call_of(function: Any) -> list[Any]:
    return [{"id": "t", "type": "function", "function": function}]


ODD: dict[str, Any] = {
    "content is a number": with_message(content=7),
    "content is an object": with_message(content={"grade": 2}),
    "content is true": with_message(content=True),
    "parts are numbers": with_message(content=[1, 2]),
    "a part's text is a list": with_message(content=[{"type": "text", "text": []}]),
    "content nests too deeply": with_message(content=NESTED.decode()),
    "content has half a surrogate pair": with_message(content='{"grade": "\ud83d"}'),
    "refusal is a list": with_message(content=None, refusal=["no"]),
    "message is a string": {**completion(GOOD), "choices": [{"message": "hello"}]},
    "choices are strings": {**completion(GOOD), "choices": ["a", "b"]},
    "choices is an object": {**completion(GOOD), "choices": {"0": GOOD}},
    "choices is a string": {**completion(GOOD), "choices": "none"},
    "finish_reason is a list": {**completion(GOOD), "choices": [{"message": {"content": GOOD}, "finish_reason": [1]}]},
    "tool_calls is a string": with_message(content=None, tool_calls="answer"),
    "tool_calls are numbers": with_message(content=None, tool_calls=[1]),
    "function is a string": with_message(content=None, tool_calls=call_of("answer")),
    "arguments is a list": with_message(content=None, tool_calls=call_of({"name": "answer", "arguments": [1]})),
    "an error with status 200": {"error": {"message": "upstream failed", "code": 502}},
}


@pytest.mark.parametrize("response_format", ["json_schema", "tool", "text"])
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_a_malformed_reply_is_invalid_and_recorded_in_the_ledger(
    server: ScriptedServer, tmp_path: Path, odd: Any, response_format: Any
) -> None:
    server.script((200, {}, json.dumps(odd).encode()))
    llm = make_llm(server, tmp_path, capabilities=CapabilityConfig(response_format=response_format), prices=PRICES)
    with pytest.raises(ReplyInvalid) as caught:
        ask(llm)
    assert len(str(caught.value)) < 500
    assert [row.outcome for row in llm.ledger.rows] == ["invalid"] * 2
    assert all(row.cost_usd for row in llm.ledger.rows)  # both were paid for


@pytest.mark.parametrize("usage", ["text", [1], 7, {"prompt_tokens": "many"}, {"prompt_tokens_details": [1]}])
def test_a_valid_reply_with_malformed_usage_is_accepted_and_recorded(
    server: ScriptedServer, tmp_path: Path, usage: Any
) -> None:
    server.script((200, {}, json.dumps(completion(GOOD, usage=usage)).encode()))
    llm = make_llm(server, tmp_path, prices=PRICES)
    assert ask(llm).grade == 2
    assert [row.outcome for row in llm.ledger.rows] == ["ok"]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": '{"grade"'}, {"type": "text", "text": ": 2}"}],
        [{"type": "output_text", "text": GOOD, "annotations": []}],
        ['{"grade": ', "2}"],
    ],
)
def test_a_list_of_content_parts_is_parsed(server: ScriptedServer, tmp_path: Path, content: Any) -> None:
    server.script((200, {}, json.dumps(with_message(content=content)).encode()))
    assert ask(make_llm(server, tmp_path)).grade == 2


def test_a_refusal_content_part_is_a_refusal(server: ScriptedServer, tmp_path: Path) -> None:
    server.script((200, {}, json.dumps(with_message(content=[{"type": "refusal", "refusal": "I won't"}])).encode()))
    with pytest.raises(ReplyInvalid, match="refused: I won't"):
        ask(make_llm(server, tmp_path))


@pytest.mark.parametrize("body", [NESTED, b"42", b"null", b"9" * 5000, b"\xff\xfe{}"])
def test_a_body_that_is_no_json_object_is_retried_and_each_attempt_recorded(
    server: ScriptedServer, tmp_path: Path, body: bytes
) -> None:
    server.script((200, {}, body))
    llm = make_llm(server, tmp_path, max_attempts=2, prices=PRICES)
    with pytest.raises(ServiceUnavailable, match="run again"):
        ask(llm)
    assert server.counts[CHAT] == 2
    assert [bool(row.cost_usd) for row in llm.ledger.rows] == [True, True]  # unreadable, and perhaps billed


@pytest.mark.parametrize(
    "data",
    [
        b'data: {"choices": ["a"]}\n\n',
        b'data: {"choices": [{"delta": "a"}]}\n\n',
        b'data: {"choices": [{"delta": {"content": 7}, "finish_reason": "stop"}]}\n\n',
        b'data: {"choices": [{"delta": {"tool_calls": [{"index": "x"}]}}]}\n\n',
        b'data: {"choices": [{"delta": {"tool_calls": [{"index": 4000000000}]}}]}\n\n',
        b"data: [1]\n\n",
        b"data: " + NESTED + b"\n\n",
    ],
)
def test_a_malformed_stream_raises_one_clear_error(server: ScriptedServer, tmp_path: Path, data: bytes) -> None:
    server.script((200, EVENTS, data))
    conversation = Conversation(make_llm(server, tmp_path), "reviewer", "be brief")
    with pytest.raises(LikenessError):
        conversation.say("hi", on_text=lambda piece: None)
    assert conversation.history.turns == []
    assert len(conversation.llm.ledger.rows) == 1


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_a_malformed_reply_to_a_tool_request_is_invalid(server: ScriptedServer, tmp_path: Path, odd: Any) -> None:
    tool = Tool("shout", "Shout.", Word, lambda word: ToolResult({}))
    server.script((200, {}, json.dumps(odd).encode()))
    llm = make_llm(server, tmp_path)
    with pytest.raises(ReplyInvalid):
        ask_with_tools(llm, SPEC, [tool], role="adjudicator", max_rounds=2)
    assert llm.ledger.rows


@pytest.mark.parametrize(
    "changes",
    [
        {"output": "text"},
        {"output": [1]},
        {"output": [{"type": "message", "content": "text"}]},
        {"output": [{"type": "message", "content": [{"type": "output_text", "text": 7}]}]},
        {"usage": "text"},
    ],
)
def test_a_malformed_reply_to_a_web_search_is_invalid(server: ScriptedServer, tmp_path: Path, changes: Any) -> None:
    from tasks.services.llm.chat.request import RequestSpec

    server.script((200, {}, json.dumps({"model": "asked-model", "status": "completed", **changes}).encode()))
    able = CapabilityConfig(response_format="json_schema", web_search="responses")
    llm = make_llm(server, tmp_path, capabilities=able)
    with pytest.raises(ReplyInvalid):
        ask_with_search(llm, RequestSpec("search", ("x",), Reply), role="profiler")
    assert [row.outcome for row in llm.ledger.rows] == ["invalid"]


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_doctor_and_capability_probe_tolerate_malformed_replies(
    server: ScriptedServer, tmp_path: Path, odd: Any
) -> None:
    server.script((200, {}, json.dumps(odd).encode()))
    able = CapabilityConfig(response_format="auto", reasoning="effort")
    found = {finding.name: finding for finding in examine(make_llm(server, tmp_path, capabilities=able), "p")}
    assert not found["response format"].is_good
