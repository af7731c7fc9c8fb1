"""Read a streamed reply: server-sent events in, one completion out, text cleaned on its way to a terminal."""

import json
from collections.abc import Callable
from typing import Any

from tasks.redaction import clean_text, redact
from tasks.services.llm.chat.completion import MOST_TOOL_CALLS, read_error
from tasks.services.llm.errors import EndpointUnavailable

MOST_HELD = 400


class StreamReader:
    """Adds up the chunks of a streamed chat completion. Raises EndpointUnavailable for unexpected shapes."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self.on_text = on_text
        self.texts: list[str] = []
        self.refusals: list[str] = []
        self.calls: list[dict[str, str]] = []
        self.finish_reason: str | None = None
        self.whole: dict[str, object] = {}

    def feed(self, line: str) -> None:
        """Take one line of the event stream."""
        if not line.startswith("data:"):
            return  # comments, event names and empty lines
        payload = line.removeprefix("data:").strip()
        if payload == "[DONE]":
            return
        try:
            chunk = json.loads(payload)
        except (ValueError, RecursionError) as error:
            raise EndpointUnavailable("the answer is no stream of JSON; ask again") from error
        if not isinstance(chunk, dict):
            raise EndpointUnavailable("the answer is no stream of JSON objects; ask again")
        if chunk.get("error"):
            raise EndpointUnavailable(f"the provider reports an error: {read_error(chunk['error'])}; ask again")
        for name in ("model", "usage"):
            if chunk.get(name) is not None:
                self.whole[name] = chunk[name]
        try:
            for choice in chunk.get("choices") or []:
                self.add(choice)
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise EndpointUnavailable("a piece of the streamed answer has an unexpected shape; ask again") from error

    def add(self, choice: dict[str, Any]) -> None:
        """Add one choice's delta."""
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta") or {}
        for name, texts in (("content", self.texts), ("refusal", self.refusals)):
            if delta.get(name):
                texts.append("" + delta[name])
        if delta.get("content"):
            self.on_text(delta["content"])
        for part in delta.get("tool_calls") or []:
            index = part.get("index", 0)
            if not 0 <= index < MOST_TOOL_CALLS:
                raise IndexError(index)
            while len(self.calls) <= index:
                self.calls.append({"id": "", "name": "", "arguments": ""})
            call, function = self.calls[index], part.get("function") or {}
            call["id"] = part.get("id") or call["id"]
            call["name"] += function.get("name") or ""
            call["arguments"] += function.get("arguments") or ""

    def finish(self) -> dict[str, object]:
        """Return the whole completion. Raises EndpointUnavailable where the stream ended early."""
        if self.finish_reason is None:
            raise EndpointUnavailable("the answer broke off; ask again")
        calls = [
            {"id": call["id"], "function": {"name": call["name"], "arguments": call["arguments"]}}
            for call in self.calls
        ]
        message = {"content": "".join(self.texts) or None, "refusal": "".join(self.refusals), "tool_calls": calls}
        return {**self.whole, "choices": [{"message": message, "finish_reason": self.finish_reason}]}


class TextCleaner:
    """Passes text on without control characters and secrets, though they may be split between pieces.

    The last word is held back until white space follows: a secret has none inside.
    """

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self.on_text = on_text
        self.held = ""

    def feed(self, piece: str) -> None:
        """Take one piece."""
        self.held += piece
        end = max(self.held.rfind(" "), self.held.rfind("\n")) + 1
        if not end and len(self.held) > MOST_HELD:  # some scripts have no spaces
            end = len(self.held) - MOST_HELD // 2
        if end:
            self.emit(self.held[:end])
            self.held = self.held[end:]

    def flush(self) -> None:
        """Pass on what was held back."""
        self.emit(self.held)
        self.held = ""

    def emit(self, text: str) -> None:
        """Clean and pass on."""
        cleaned = clean_text(redact(text))
        if cleaned:
            self.on_text(cleaned)
