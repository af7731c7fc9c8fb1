"""Response formats: how structured output is requested from different servers, and read from their replies.

Strictest first: strict JSON schema; JSON object with a schema beside it (llama.cpp); a forced tool call; JSON mode
with the schema in the prompt; plain text, from which the first JSON object is taken.
"""

import json

from pydantic import BaseModel

from tasks.services.llm.chat.body import ChatBody
from tasks.services.llm.chat.completion import ChatCompletion
from tasks.services.llm.chat.json_schema import strict_schema
from tasks.services.llm.config import ProfileConfig, ResponseFormat

TOOL = "answer"


def ask_for(body: ChatBody, reply: type[BaseModel], response_format: ResponseFormat) -> ChatBody:
    """Return a chat completion's body that requests a reply of the given type."""
    schema = strict_schema(reply)
    # The list is copied: callers append to it, and a caller's body must not change.
    body = {**body, "messages": list(body["messages"])}
    if response_format == "json_schema":
        body["response_format"] = {
            "type": "json_schema", "json_schema": {"name": reply.__name__, "strict": True, "schema": schema},
        }  # fmt: skip
    elif response_format == "json_object":
        body["response_format"] = {"type": "json_object", "schema": schema}
    elif response_format == "tool":
        function = {"name": TOOL, "description": "Give the answer.", "parameters": schema, "strict": True}
        body["tools"] = [{"type": "function", "function": function}]
        body["tool_choice"] = {"type": "function", "function": {"name": TOOL}}
    else:
        words = f"Reply with one JSON object and nothing else. It must fit this JSON schema: {json.dumps(schema)}"
        first, *others = body["messages"]
        body["messages"] = [{**first, "content": f"{first['content']}\n\n{words}"}, *others]
        if response_format == "json_mode":
            body["response_format"] = {"type": "json_object"}
    return body


def read_content(completion: ChatCompletion, response_format: ResponseFormat) -> str | None:
    """Return the part of a reply that should be JSON."""
    if response_format == "tool":
        return completion.tool_calls[0].arguments if completion.tool_calls else None
    content = completion.content
    if response_format == "text" and content:
        return find_object(content) or content
    return content


def find_object(text: str) -> str | None:
    """Return the first complete JSON object in a text, for example inside a Markdown code fence."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except ValueError:
            start = text.find("{", start + 1)
            continue
        except RecursionError:
            return None
        return text[start:end] if isinstance(found, dict) else None
    return None


def set_reasoning(body: ChatBody, profile: ProfileConfig, *, is_reasoning: bool) -> ChatBody:
    """Return the body with reasoning switched on or off; its tokens count as output, so the cap is raised."""
    kind = profile.capabilities.reasoning
    if kind == "none":
        return body
    if kind == "effort":
        body = {**body, "reasoning_effort": "medium" if is_reasoning else "none"}
    else:
        body = {**body, "reasoning": {"enabled": is_reasoning}}
    if is_reasoning:
        body["max_completion_tokens"] = body["max_completion_tokens"] + profile.reasoning_tokens
    return body
