"""Streamed replies as a scripted server gives them."""

import json
from typing import Any

from pydantic import BaseModel

Streamed = tuple[int, dict[str, str], bytes]
EVENTS = {"content-type": "text/event-stream"}


class Word(BaseModel):
    """A tool's arguments."""

    word: str


def stream(*deltas: dict[str, Any], reason: str | None = "stop") -> Streamed:
    """Return a streamed reply; without a reason it breaks off."""
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "asked-model"}
    rows: list[dict[str, Any]] = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    if reason:
        rows.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        rows.append({**head, "choices": [], "usage": {"prompt_tokens": 50, "completion_tokens": 7, "total_tokens": 57}})
    data = b"".join(b"data: " + json.dumps(row).encode() + b"\n\n" for row in rows)
    return 200, EVENTS, data + (b"data: [DONE]\n\n" if reason else b"")


def say(*words: str) -> Streamed:
    return stream(*({"content": word} for word in words))


def call(name: str, arguments: str) -> Streamed:
    """Return a streamed call whose arguments come in two pieces."""
    first = {"index": 0, "id": "call-1", "type": "function", "function": {"name": name, "arguments": arguments[:4]}}
    rest = {"index": 0, "function": {"arguments": arguments[4:]}}
    return stream({"tool_calls": [first]}, {"tool_calls": [rest]}, reason="tool_calls")
