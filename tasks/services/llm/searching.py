"""Let a model search the web before it answers: text only, with the pages that it cites.

OpenAI and xAI search in their Responses APIs, OpenRouter by a server tool of chat completions.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

from tasks.errors import ConfigError
from tasks.services.llm.client import Answer, LlmService
from tasks.services.llm.dialects import find_object
from tasks.services.llm.ledger import LedgerRow
from tasks.services.llm.requests import RequestSpec, T
from tasks.services.llm.schema import strict_schema

MOST_DOMAINS = 5


@dataclass(frozen=True)
class Found(Generic[T]):
    """An answer and the addresses it cites."""

    answer: Answer[T]
    citations: tuple[str, ...]


def ask_with_search(llm: LlmService, spec: RequestSpec[T], *, role: str, domains: Sequence[str] = ()) -> Found[T]:
    """Return a validated reply of a role's first profile that can search; pictures never go along.

    Raises:
        ConfigError: no profile of the role searches, or the request has pictures.
        ReplyInvalid: the reply doesn't fit.

    """
    names = [name for name in llm.config.rungs(role) if llm.config.profiles[name].capabilities.web_search != "none"]
    if not names:
        raise ConfigError(f"no profile of the {role} searches the web; choose one whose capabilities say so")
    if any(isinstance(part, bytes) for part in spec.parts):
        raise ConfigError("pictures are not sent along with a web search")
    name = names[0]
    profile = llm.config.profiles[name]
    kept = llm.find_cached(spec, name=name, role=role)
    if kept is not None:
        return Found(kept, tuple(json.loads(kept.trace or "[]")))
    row = LedgerRow(role, name, profile.model, outcome="", reason="web search")
    started = time.monotonic()
    if profile.capabilities.web_search == "openrouter":
        tool = {"type": "openrouter:web_search", "parameters": {"allowed_domains": list(domains)} if domains else {}}
        body = {**spec.body(profile, "json_schema"), "tools": [tool]}
        completion = llm.send(body, row=row)
    else:
        filters = {"filters": {"allowed_domains": list(domains[:MOST_DOMAINS])}} if domains else {}
        body = {**spec.plain_body(profile), "tools": [{"type": "web_search", **filters}]}
        completion = llm.send(body, row=row, create=lambda client, body, timeout_seconds: respond(
            client, body, spec, timeout_seconds=timeout_seconds
        ))  # fmt: skip
    message = completion["choices"][0]["message"]
    citations = read_citations(message)
    message["reasoning_content"] = json.dumps(citations)  # kept beside the reply
    message["content"] = find_object(message.get("content") or "") or message.get("content")
    message["tool_calls"] = [{"function": {"arguments": message["content"]}}]  # where schemas are asked for by a tool
    answer = llm.accept(spec, completion, row=LedgerRow(**{**vars(row), "seconds": time.monotonic() - started}))
    return Found(answer, tuple(citations))


def respond(client: Any, body: dict[str, Any], spec: RequestSpec[T], *, timeout_seconds: float) -> dict[str, Any]:
    """Ask by the Responses API, and return its reply as a chat completion."""
    text = "\n".join(part for part in spec.parts if isinstance(part, str))
    shape = {"type": "json_schema", "name": spec.reply.__name__, "strict": True, "schema": strict_schema(spec.reply)}
    response = client.responses.create(
        model=body["model"], instructions=spec.system, input=text, tools=body["tools"], text={"format": shape},
        max_output_tokens=body["max_completion_tokens"], store=False, timeout=timeout_seconds,
    ).model_dump()  # fmt: skip
    parts = [part for item in response["output"] if item.get("type") == "message" for part in item.get("content") or []]
    written = "".join(part.get("text") or "" for part in parts)
    refusal = "".join(part.get("refusal") or "" for part in parts)
    notes = [note for part in parts for note in part.get("annotations") or []]
    usage = response.get("usage") or {}
    is_whole = response.get("status") == "completed"
    return {
        "model": response.get("model"),
        "choices": [
            {
                "message": {"role": "assistant", "content": written, "refusal": refusal or None, "annotations": notes},
                "finish_reason": "stop" if is_whole else "length",
            }
        ],
        "usage": {
            "prompt_tokens": usage.get("input_tokens"),
            "completion_tokens": usage.get("output_tokens"),
            "prompt_tokens_details": usage.get("input_tokens_details"),
            "completion_tokens_details": usage.get("output_tokens_details"),
            "cost_in_usd_ticks": usage.get("cost_in_usd_ticks"),
        },
    }


def read_citations(message: dict[str, Any]) -> list[str]:
    """Return the addresses that a reply cites, in order, each once."""
    notes = [note for note in message.get("annotations") or [] if note.get("type") == "url_citation"]
    urls = [str((note.get("url_citation") or note).get("url") or "") for note in notes]
    return list(dict.fromkeys(url for url in urls if url.startswith(("https://", "http://"))))
