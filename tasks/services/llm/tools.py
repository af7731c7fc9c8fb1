"""Let a model call local functions before it answers: a typed registry, validated arguments, bounded rounds."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from tasks.errors import ReplyInvalid
from tasks.services.llm.client import Answer, LlmService
from tasks.services.llm.dialects import TOOL, ask_for, read_trace
from tasks.services.llm.ledger import LedgerRow
from tasks.services.llm.requests import RequestSpec, T, encode_image
from tasks.services.llm.schema import strict_schema


@dataclass(frozen=True)
class ToolResult:
    """What a tool found: plain values, and perhaps a picture to look at."""

    values: dict[str, Any]
    picture: bytes | None = None


@dataclass(frozen=True)
class Tool:
    """A function that only looks; the description is what the model reads."""

    name: str
    description: str
    arguments: type[BaseModel]
    run: Callable[[Any], ToolResult]

    def describe(self) -> dict[str, Any]:
        """Return the tool as a chat completion takes it."""
        function = {
            "name": self.name, "description": self.description,
            "parameters": strict_schema(self.arguments), "strict": True,
        }  # fmt: skip
        return {"type": "function", "function": function}

    def call(self, arguments: str) -> ToolResult:
        """Run with a model's arguments; what doesn't fit is told to it, not raised."""
        try:
            return self.run(self.arguments.model_validate_json(arguments))
        except ValidationError as error:
            first = error.errors()[0]
            return ToolResult({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"})


@dataclass(frozen=True)
class Examined:
    """An answer, and the names of the tools that were called for it."""

    answer: Answer[Any]
    called: tuple[str, ...]
    trace: str = ""
    """What the model thought aloud, where its provider tells."""


def ask_with_tools(
    llm: LlmService, spec: RequestSpec[T], tools: Sequence[Tool], *, role: str, max_rounds: int
) -> Examined:
    """Return a reply that was given through the `answer` tool, after at most `max_rounds` rounds of others.

    Raises:
        ReplyInvalid: no answer that fits came, not even when nothing else could be called.

    """
    name = llm.config.rungs(role)[0]
    profile = llm.config.profiles[name]
    cached = llm.find_cached(spec, name=name, role=role)
    if cached is not None:
        return read_examined(cached)
    by_name = {tool.name: tool for tool in tools}
    forced = ask_for(spec.plain_body(profile), spec.reply, "tool")
    body = {**forced, "tools": [tool.describe() for tool in tools] + forced["tools"], "tool_choice": "required"}
    called: list[str] = []
    for number in range(max_rounds + 1):
        if number == max_rounds:
            body["tool_choice"] = forced["tool_choice"]
        row = LedgerRow(role, name, profile.model, outcome="")
        completion = llm.send(body, row=row)
        message = ((completion.get("choices") or [{}])[0].get("message")) or {}
        calls = message.get("tool_calls") or []
        answers = [call for call in calls if call["function"]["name"] == TOOL]
        if answers or not calls:
            return read_examined(accept(llm, spec, completion, answers, called, row=row))
        llm.book_completion(completion, row=row)
        body["messages"] = [*body["messages"], {"role": "assistant", "content": None, "tool_calls": calls}]
        body["messages"] += run_calls(calls, by_name, called, max_side=profile.max_image_side)
    raise ReplyInvalid(f"no answer after {max_rounds} rounds of tools")


def read_examined(answer: Answer[Any]) -> Examined:
    """Return an answer with what was noted beside it."""
    notes = json.loads(answer.trace or "{}")
    return Examined(answer, tuple(notes.get("called", ())), notes.get("trace", ""))


def run_calls(
    calls: list[dict[str, Any]], by_name: dict[str, Tool], called: list[str], *, max_side: int
) -> list[dict[str, Any]]:
    """Run what was called and return the messages that tell what came of it; pictures follow as a user's."""
    messages, pictures = [], []
    for call in calls:
        name = call["function"]["name"]
        result = ToolResult({"error": f"there is no tool {name}"})
        if name in by_name:
            result = by_name[name].call(call["function"]["arguments"])
            called.append(name)
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result.values)})
        if result.picture is not None:  # tools answer in text alone
            url = encode_image(result.picture, max_side=max_side)
            pictures.append({"type": "image_url", "image_url": {"url": url}})
    if pictures:
        messages.append({"role": "user", "content": [{"type": "text", "text": "What you asked to see:"}, *pictures]})
    return messages


def accept(
    llm: LlmService,
    spec: RequestSpec[T],
    completion: dict[str, Any],
    answers: list[dict[str, Any]],
    called: list[str],
    *,
    row: LedgerRow,
) -> Answer[T]:
    """Book and keep an answer as if it had been a plain reply. Raises ReplyInvalid."""
    choice = (completion.get("choices") or [{}])[0]
    told = choice.get("message") or {}
    notes = json.dumps({"called": called, "trace": read_trace(told)})
    message = {**told, "tool_calls": answers, "reasoning_content": notes}
    if answers:
        message["content"] = answers[0]["function"]["arguments"]
    finish_reason = "stop" if answers else choice.get("finish_reason")
    whole = {**completion, "choices": [{**choice, "message": message, "finish_reason": finish_reason}]}
    return llm.accept(spec, whole, row=row)
