"""Read a streamed reply: server-sent events in, one completion out; text is cleaned before a terminal shows it."""

import json
from collections.abc import Callable
from typing import Any

from tasks.redaction import clean_text, redact
from tasks.services.llm.chat.completion import MAX_TOOL_CALLS, read_error
from tasks.services.llm.errors import EndpointUnavailable

MAX_HELD = 400  # characters without white space


class StreamReader:
    """Accumulates the chunks of a streamed chat completion. Raises EndpointUnavailable for unexpected shapes."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self.on_text = on_text
        self.texts: list[str] = []
        self.refusals: list[str] = []
        self.calls: list[dict[str, str]] = []
        self.finish_reason: str | None = None
        self.whole: dict[str, object] = {}

    def feed(self, line: str) -> None:
        """Process one line of the event stream."""
        if not line.startswith("data:"):
            return  # comments, event names and empty lines
        payload = line.removeprefix("data:").strip()
        if payload == "[DONE]":
            return
        try:
            chunk = json.loads(payload)
        except (ValueError, RecursionError) as error:
            raise EndpointUnavailable("the response is not a stream of JSON; ask again") from error
        if not isinstance(chunk, dict):
            raise EndpointUnavailable("the response is not a stream of JSON objects; ask again")
        # Once a stream has begun, its status is 200: a later error can only come as a chunk.
        if chunk.get("error"):
            raise EndpointUnavailable(f"the provider reports an error: {read_error(chunk['error'])}; ask again")
        # With `include_usage` the last chunk has the usage and an empty list of choices.
        for name in ("model", "usage"):
            if chunk.get(name) is not None:
                self.whole[name] = chunk[name]
        try:
            for choice in chunk.get("choices") or []:
                self.add(choice)
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise EndpointUnavailable("a chunk of the streamed response has an unexpected shape; ask again") from error

    def add(self, choice: dict[str, Any]) -> None:
        """Add one choice's delta."""
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta") or {}
        for name, texts in (("content", self.texts), ("refusal", self.refusals)):
            if delta.get(name):
                texts.append("" + delta[name])  # raises TypeError unless it is a string; `feed` reports that
        if delta.get("content"):
            self.on_text(delta["content"])
        for part in delta.get("tool_calls") or []:
            index = part.get("index", 0)
            # The list below grows up to this index, so a hostile one could exhaust memory.
            if not 0 <= index < MAX_TOOL_CALLS:
                raise IndexError(index)
            while len(self.calls) <= index:
                self.calls.append({"id": "", "name": "", "arguments": ""})
            call, function = self.calls[index], part.get("function") or {}
            call["id"] = part.get("id") or call["id"]  # comes whole; name and arguments come in fragments
            call["name"] += function.get("name") or ""
            call["arguments"] += function.get("arguments") or ""

    def finish(self) -> dict[str, object]:
        """Return the whole completion. Raises EndpointUnavailable where the stream ended early."""
        # A closed connection looks like the end of the stream. Only `finish_reason` shows that the reply is complete.
        if self.finish_reason is None:
            raise EndpointUnavailable("the response ended early; ask again")
        calls = [
            {"id": call["id"], "function": {"name": call["name"], "arguments": call["arguments"]}}
            for call in self.calls
        ]
        message = {"content": "".join(self.texts) or None, "refusal": "".join(self.refusals), "tool_calls": calls}
        return {**self.whole, "choices": [{"message": message, "finish_reason": self.finish_reason}]}


class TextCleaner:
    """Forwards text without control characters and secrets, even where these are split between pieces.

    The last word is held back until white space follows it, since a secret contains none.
    """

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self.on_text = on_text
        self.held = ""

    def feed(self, piece: str) -> None:
        """Forward as much text as is complete with this piece."""
        self.held += piece
        end = max(self.held.rfind(" "), self.held.rfind("\n")) + 1
        if not end and len(self.held) > MAX_HELD:
            # Some scripts have no spaces. Half stays held, since a secret may span the cut.
            end = len(self.held) - MAX_HELD // 2
        if end:
            self.emit(self.held[:end])
            self.held = self.held[end:]

    def flush(self) -> None:
        """Forward the held text."""
        self.emit(self.held)
        self.held = ""

    def emit(self, text: str) -> None:
        """Forward cleaned text."""
        cleaned = clean_text(redact(text))
        if cleaned:
            self.on_text(cleaned)
