"""Tool use: a model calls local functions before it answers; arguments are validated, rounds bounded."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError

from tasks.errors import ReplyInvalid
from tasks.services.llm.budget.ledger import LedgerRow
from tasks.services.llm.chat.body import ChatBody, encode_image
from tasks.services.llm.chat.completion import ToolCall
from tasks.services.llm.chat.json_schema import strict_schema
from tasks.services.llm.chat.request import Answer, RequestSpec, T
from tasks.services.llm.chat.response_format import TOOL, ask_for
from tasks.services.llm.service import LlmService

MAX_IMAGES = 4  # that one round of tools shows


@dataclass(frozen=True)
class ToolResult:
    """A tool's result: JSON values, and optionally an encoded image."""

    values: dict[str, object]
    image: bytes | None = None


@dataclass(frozen=True)
class Tool:
    """A local function that a model may call; it chooses by the description."""

    name: str
    description: str
    arguments: type[BaseModel]
    run: Callable[[Any], ToolResult]

    def describe(self) -> dict[str, object]:
        """Return the tool as an entry of a chat completion's `tools`."""
        function = {
            "name": self.name, "description": self.description,
            "parameters": strict_schema(self.arguments), "strict": True,
        }  # fmt: skip
        return {"type": "function", "function": function}

    def call(self, arguments: str) -> ToolResult:
        """Run with a model's arguments; a validation error is returned to the model, which may correct the call."""
        try:
            return self.run(self.arguments.model_validate_json(arguments))
        except ValidationError as error:
            first = error.errors()[0]
            return ToolResult({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"})


def ask_with_tools(
    llm: LlmService, spec: RequestSpec[T], tools: Sequence[Tool], *, role: str, max_rounds: int
) -> Answer[T]:
    """Return a reply given through the `answer` tool, after at most `max_rounds` rounds of other tools.

    Raises:
        ReplyInvalid: no valid answer, not even in the last round, which forces the `answer` tool.

    """
    name = llm.config.fallback_chain(role)[0]
    row = LedgerRow(role, name, llm.config.profiles[name].model, outcome="")
    loop = ToolLoop(llm, tools, row, max_rounds)
    return llm.find_or_ask(spec, row, partial(loop.run, spec), num_calls=max_rounds + 1)


@dataclass(frozen=True)
class ToolLoop:
    """Calls to a model that may use tools until it answers."""

    llm: LlmService
    tools: Sequence[Tool]
    row: LedgerRow
    max_rounds: int

    def run(self, spec: RequestSpec[T]) -> Answer[T]:
        """Return the answer; see `ask_with_tools`."""
        llm, row = self.llm, self.row
        profile = llm.config.profiles[row.profile]
        by_name = {tool.name: tool for tool in self.tools}
        forced = ask_for(spec.plain_body(profile), spec.reply, "tool")
        described = [tool.describe() for tool in self.tools]
        body: ChatBody = {**forced, "tools": [*described, *forced["tools"]], "tool_choice": "required"}
        called: list[str] = []
        for number in range(self.max_rounds + 1):
            if number == self.max_rounds:
                body["tool_choice"] = forced["tool_choice"]
            completion = llm.send(body, row=row)
            # Other calls beside an answer are ignored: `accept` reads the first tool call.
            answers = tuple(call for call in completion.tool_calls if call.name == TOOL)
            if answers:
                answered = replace(completion, tool_calls=answers, finish_reason="stop")
                return llm.accept(spec, answered, row=row, response_format="tool", called=tuple(called))
            # A server may ignore `tool_choice`. Its text is validated like any other reply.
            if not completion.tool_calls:
                return llm.accept(spec, completion, row=row, called=tuple(called))
            llm.record_completion(completion, row=row)  # each round is billed; `accept` records only the last
            calls = [call.to_wire() for call in completion.tool_calls]
            body["messages"] = [*body["messages"], {"role": "assistant", "content": None, "tool_calls": calls}]
            body["messages"] += run_tool_calls(completion.tool_calls, by_name, called, max_side=profile.max_image_side)
        raise ReplyInvalid(f"no answer after {self.max_rounds} rounds of tools")


def run_tool_calls(
    calls: Sequence[ToolCall], by_name: dict[str, Tool], called: list[str], *, max_side: int
) -> list[dict[str, object]]:
    """Run tool calls and return their result messages; images follow in a user message."""
    messages: list[dict[str, object]] = []
    images: list[dict[str, object]] = []
    for call in calls:
        result = ToolResult({"error": f"there is no tool {call.name}"})
        if call.name in by_name:
            result = by_name[call.name].call(call.arguments)
            called.append(call.name)
        messages.append({"role": "tool", "tool_call_id": call.call_id, "content": json.dumps(result.values)})
        # The API takes text alone in tool messages. Every call needs one, else the next request is refused.
        if result.image is not None and len(images) < MAX_IMAGES:
            url = encode_image(result.image, max_side=max_side)
            images.append({"type": "image_url", "image_url": {"url": url}})
    if images:
        messages.append({"role": "user", "content": [{"type": "text", "text": "What you asked to see:"}, *images]})
    return messages
