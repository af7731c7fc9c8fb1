"""The mini vision server's replies: a tool call, JSON by schema, or a sentence."""

import json
import re
import uuid
from typing import Any

from tasks.mini.vision_server.schema_answers import Question, describe, fill_schema

# `caption NAME: TEXT`, with variations such as `caption for NAME to TEXT`.
CAPTION_REQUEST = re.compile(
    r"caption (?:of |for )?(\S+\.(?:png|jpe?g|webp|gif))\s*(?::|=|\bto\b|\bas\b)?\s*(.+)", re.I
)


def write_message(body: dict[str, Any], question: Question) -> tuple[dict[str, Any], str]:
    """Return the assistant's message and its finish reason."""
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    tool = choose_tool(body, question)
    if tool is not None:
        call = {"name": tool["name"], "arguments": json.dumps(fill_arguments(tool, question))}
        message["tool_calls"] = [{"id": f"call_{uuid.uuid4().hex[:16]}", "type": "function", "function": call}]
        return message, "tool_calls"
    wanted = body.get("response_format") or {"type": "text"}
    if wanted.get("type") == "json_schema":
        message["content"] = json.dumps(fill_schema(wanted["json_schema"]["schema"], question))
    elif wanted.get("type") == "json_object":
        message["content"] = json.dumps({"description": describe(question)})
    else:
        message["content"] = say(body, question)
    return message, "stop"


def choose_tool(body: dict[str, Any], question: Question) -> dict[str, Any] | None:
    """Return the tool to call, if any: a forced one, a required one, or `apply_caption` where the user asks for it."""
    tools: dict[str, dict[str, Any]] = {tool["function"]["name"]: tool["function"] for tool in body.get("tools") or []}
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, dict):
        return tools.get(choice["function"]["name"])
    if not tools or choice == "none":
        return None
    first, *_, last = [*tools.values(), *tools.values()]  # twice, so that a single tool is both
    # The client lists the answer tool last: call the first tool once, then answer with its result.
    if choice == "required":
        return last if question.tool_results else first
    is_asked = "apply_caption" in tools and not question.tool_results and CAPTION_REQUEST.search(question.last_text)
    return tools["apply_caption"] if is_asked else None


def fill_arguments(tool: dict[str, Any], question: Question) -> Any:
    """Return a tool call's arguments: parsed from a caption request, else filled by schema."""
    asked = CAPTION_REQUEST.search(question.last_text)
    if tool["name"] == "apply_caption" and asked:
        surroundings, _, view = asked[2].strip().strip('"').partition(", ")
        return {"photo": asked[1], "surroundings": surroundings, "view": view}
    return fill_schema(tool["parameters"], question)


def say(body: dict[str, Any], question: Question) -> str:
    """Return a sentence: a tool's result, an example request, or a caption."""
    if question.tool_results:
        return f"Tool result: {question.tool_results[-1]}"
    if any(tool["function"]["name"] == "apply_caption" for tool in body.get("tools") or []):
        return (
            "I am the mini vision server and understand one kind of request, for example: "
            "caption fish-7-01.jpg: on a red table, seen from above"
        )
    return describe(question)
