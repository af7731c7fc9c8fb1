"""Talking to a model: replies stream, tools act, history is kept, summed up and left alone by an interrupt."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ReplyInvalid, ServiceUnavailable
from tasks.services.llm.agents.conversation import Conversation, History
from tasks.services.llm.agents.tools import Tool, ToolResult
from tasks.services.llm.config import CapabilityConfig
from tests.support.llm import CHAT, make_llm
from tests.support.llm_server import ScriptedServer, completion, scripted_server
from tests.support.llm_stream import EVENTS, Word, call, say, stream

LAST = "and now? " * 30


def talk(server: ScriptedServer, folder: Path, tools: tuple[Tool, ...] = (), **changes: Any) -> Conversation:
    return Conversation(make_llm(server, folder, **changes), "reviewer", "be brief", tools)


def test_a_streamed_reply_is_recorded_in_the_ledger_with_its_usage(tmp_path: Path) -> None:
    shown: list[str] = []
    with scripted_server() as server:
        server.script(say("Hel", "lo"))
        talked = talk(server, tmp_path, prices={"input": 1.0, "output": 10.0, "date": "2026-11-22"})
        assert talked.say("hi", on_text=shown.append) == "Hello"
    assert "".join(shown) == "Hello"
    [row] = talked.llm.ledger.rows
    assert (row.outcome, row.usage.output_tokens, row.cost_usd) == ("ok", 7, pytest.approx(120e-6))
    assert server.bodies[0]["stream_options"] == {"include_usage": True}


def test_previous_turns_are_sent_with_each_request(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(say("one"), say("two"))
        talked = talk(server, tmp_path)
        talked.say("first", on_text=lambda piece: None)
        talked.say("second", on_text=lambda piece: None)
    said = [message["content"] for message in server.bodies[1]["messages"]]
    assert said == ["be brief", "first", "one", "second"]
    assert History.model_validate_json(talked.history.model_dump_json()) == talked.history


def test_a_streamed_tool_call_is_executed_and_its_result_sent_to_the_model(tmp_path: Path) -> None:
    asked: list[str] = []

    def shout(wanted: Word) -> ToolResult:
        asked.append(wanted.word)
        return ToolResult({"loud": wanted.word.upper()})

    with scripted_server() as server:
        server.script(call("shout", '{"word": "yes"}'), say("Done."))
        talked = talk(server, tmp_path, (Tool("shout", "Shout a word.", Word, shout),))
        assert talked.say("shout yes", on_text=lambda piece: None) == "Done."
    assert asked == ["yes"]
    assert server.bodies[1]["messages"][-1]["content"] == '{"loud": "YES"}'
    assert [message["role"] for message in talked.history.turns[0]] == ["user", "assistant", "tool", "assistant"]


def test_a_model_that_only_calls_tools_is_an_error(tmp_path: Path) -> None:
    tool = Tool("shout", "Shout a word.", Word, lambda wanted: ToolResult({}))
    with scripted_server() as server:
        server.script(call("shout", '{"word": "yes"}'))
        talked = talk(server, tmp_path, (tool,))
        with pytest.raises(ReplyInvalid, match="calls tools in each of 6 rounds"):
            talked.say("shout yes", on_text=lambda piece: None)
    assert talked.history.turns == []


def test_an_error_while_text_is_shown_leaves_a_ledger_row(tmp_path: Path) -> None:
    def fail(piece: str) -> None:
        raise BrokenPipeError

    with scripted_server() as server:
        server.script(say("Hel", "lo"))
        talked = talk(server, tmp_path)
        with pytest.raises(BrokenPipeError):
            talked.say("hi", on_text=fail)
    assert [(row.outcome, row.usage_fault) for row in talked.llm.ledger.rows] == [
        ("BrokenPipeError", "the reply was not read")
    ]


def test_an_interrupt_cancels_the_reply_and_leaves_the_history_unchanged(tmp_path: Path) -> None:
    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    with scripted_server() as server:
        server.script(say("Hel", "lo"), say("again"))
        talked = talk(server, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            talked.say("hi", on_text=interrupt)
        assert talked.history.turns == []
        assert [row.outcome for row in talked.llm.ledger.rows] == ["cancelled"]
        assert talked.say("hi", on_text=lambda piece: None) == "again"


def test_a_truncated_stream_raises_and_is_not_retried(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(stream({"content": "Hel"}, reason=None))
        talked = talk(server, tmp_path)
        with pytest.raises(ServiceUnavailable, match="ended early"):
            talked.say("hi", on_text=lambda piece: None)
        assert server.counts[CHAT] == 1
    assert talked.history.turns == []


def test_a_stream_of_invalid_json_raises_service_unavailable(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script((200, EVENTS, b"data: {malformed\n\n"))
        with pytest.raises(ServiceUnavailable, match="not a stream of JSON"):
            talk(server, tmp_path).say("hi", on_text=lambda piece: None)


@pytest.mark.parametrize("data", [b"\n" * 20_000, b"data: " + b"x" * 20_000], ids=["empty lines", "one endless line"])
def test_a_stream_over_the_byte_limit_raises_service_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr("tasks.services.llm.chat.transport.MAX_BYTES", 10_000)
    with scripted_server() as server:
        server.script((200, EVENTS, data))
        with pytest.raises(ServiceUnavailable, match="longer than"):
            talk(server, tmp_path).say("hi", on_text=lambda piece: None)


def test_turns_beyond_the_context_window_are_summarized(tmp_path: Path) -> None:
    small = CapabilityConfig(response_format="json_schema", context_tokens=2000)
    with scripted_server() as server:
        plain = (200, {}, json.dumps(completion("They agreed on blue.")).encode())
        server.script(*[say("fine")] * 6, plain, say("still here"))
        talked = talk(server, tmp_path, capabilities=small)
        for number in range(6):
            talked.say(f"{number} " + "word " * 90, on_text=lambda piece: None)
        assert talked.say(LAST, on_text=lambda piece: None) == "still here"
    messages = server.bodies[-1]["messages"]
    assert messages[0]["content"].endswith("in short: They agreed on blue.")
    assert messages[1]["content"].startswith("2 ")  # the last four turns are kept word by word
    assert messages[-1]["content"] == LAST


def test_old_turns_are_dropped_if_summarizing_fails(tmp_path: Path) -> None:
    small = CapabilityConfig(response_format="json_schema", context_tokens=2000)
    with scripted_server() as server:
        server.script(*[say("fine")] * 6, (500, {}, b"{}"), (500, {}, b"{}"), (500, {}, b"{}"), say("still here"))
        talked = talk(server, tmp_path, capabilities=small)
        for number in range(6):
            talked.say(f"{number} " + "word " * 90, on_text=lambda piece: None)
        assert talked.say(LAST, on_text=lambda piece: None) == "still here"
    assert talked.history.summary == ""


def test_a_server_without_streaming_gets_plain_requests(tmp_path: Path) -> None:
    shown: list[str] = []
    with scripted_server() as server:
        server.script("Hello")
        plain = CapabilityConfig(response_format="json_schema", streaming=False)
        assert talk(server, tmp_path, capabilities=plain).say("hi", on_text=shown.append) == "Hello"
    assert shown == ["Hello"]
    assert "stream" not in server.bodies[0]
