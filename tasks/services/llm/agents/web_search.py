"""Web search before an answer: text only, with citations.

OpenAI and xAI search through their Responses APIs, OpenRouter through a server tool of chat completions.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Generic, cast

from tasks.errors import ConfigError
from tasks.services.llm.budget.ledger import LedgerRow
from tasks.services.llm.chat.body import ChatBody
from tasks.services.llm.chat.json_schema import strict_schema
from tasks.services.llm.chat.request import Answer, RequestSpec, T
from tasks.services.llm.chat.transport import read_object
from tasks.services.llm.service import LlmService

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.responses import ResponseFormatTextJSONSchemaConfigParam, WebSearchToolParam

MAX_DOMAINS = 5  # xAI's limit on `allowed_domains`


@dataclass(frozen=True)
class SearchAnswer(Generic[T]):
    """An answer and the addresses it cites."""

    answer: Answer[T]
    citations: tuple[str, ...]


def ask_with_search(
    llm: LlmService, spec: RequestSpec[T], *, role: str, domains: Sequence[str] = ()
) -> SearchAnswer[T]:
    """Return a validated reply of a role's first profile that can search the web.

    Raises:
        ConfigError: no profile of the role searches, or the request has images, which must not reach a search engine.
        ReplyInvalid: the reply doesn't fit.

    """
    names = [
        name for name in llm.config.fallback_chain(role) if llm.config.profiles[name].capabilities.web_search != "none"
    ]
    if not names:
        raise ConfigError(f"no profile of the {role} searches the web; choose one whose capabilities say so")
    if any(isinstance(part, bytes) for part in spec.parts):
        raise ConfigError("pictures are not sent along with a web search")
    spec = replace(spec, tools=(*spec.tools, "web_search", *domains))  # part of the cache key
    row = LedgerRow(role, names[0], llm.config.profiles[names[0]].model, outcome="", reason="web search")
    answer = llm.find_or_ask(spec, row, partial(search_and_answer, llm, spec, row=row, domains=domains), num_calls=1)
    return SearchAnswer(answer, answer.citations)


def search_and_answer(llm: LlmService, spec: RequestSpec[T], *, row: LedgerRow, domains: Sequence[str]) -> Answer[T]:
    """Ask a profile that searches the web; see `ask_with_search`."""
    profile = llm.config.profiles[row.profile]
    started = time.monotonic()
    if profile.capabilities.web_search == "openrouter":
        parameters = {"allowed_domains": list(domains)} if domains else {}
        body = spec.body(profile, "json_schema")
        body["tools"] = [{"type": "openrouter:web_search", "parameters": parameters}]
        completion = llm.send(body, row=row)
    else:
        filters = {"filters": {"allowed_domains": list(domains[:MAX_DOMAINS])}} if domains else {}
        body = spec.plain_body(profile)
        body["tools"] = [{"type": "web_search", **filters}]
        completion = llm.send(body, row=row, create=lambda client, body, timeout_seconds: respond(
            client, body, spec, timeout_seconds=timeout_seconds
        ))  # fmt: skip
    row = replace(row, seconds=time.monotonic() - started)
    return llm.accept(spec, completion, row=row, response_format="text")


def respond(client: "OpenAI", body: ChatBody, spec: RequestSpec[T], *, timeout_seconds: float) -> dict[str, object]:
    """Send a request to the Responses API and return the reply as a chat completion; the provider stores neither."""
    text = "\n".join(part for part in spec.parts if isinstance(part, str))
    shape: ResponseFormatTextJSONSchemaConfigParam = {
        "type": "json_schema", "name": spec.reply.__name__, "strict": True, "schema": strict_schema(spec.reply),
    }  # fmt: skip
    deadline = time.monotonic() + timeout_seconds
    with client.responses.with_streaming_response.create(
        model=body["model"], instructions=spec.system, input=text, text={"format": shape},
        tools=cast("list[WebSearchToolParam]", body["tools"]),
        max_output_tokens=body["max_completion_tokens"], store=False, timeout=timeout_seconds,
    ) as response:  # fmt: skip
        return to_chat(read_object(response, deadline=deadline, seconds=timeout_seconds))


def to_chat(response: dict[str, object]) -> dict[str, object]:
    """Return a reply of the Responses API as a chat completion.

    Parts of an unexpected shape are passed through, so that `parse_completion` reports them as any server's.
    """
    whole: dict[str, object] = {"model": response.get("model"), "usage": to_chat_usage(response.get("usage"))}
    output = response.get("output")
    if not isinstance(output, list):
        return {**whole, "choices": output or []}
    parts: list[object] = []
    for item in output:
        if not isinstance(item, dict):
            return {**whole, "choices": [item]}
        if item.get("type") == "message":
            content = item.get("content") or []
            parts += content if isinstance(content, list) else [content]
    notes = [part.get("annotations") for part in parts if isinstance(part, dict)]
    flat = [note for listed in notes if isinstance(listed, list) for note in listed]
    message = {"content": parts, "annotations": flat}
    # `incomplete` means a token limit or a content filter; both are refused as a truncated reply.
    is_whole = response.get("status") == "completed"
    return {**whole, "choices": [{"message": message, "finish_reason": "stop" if is_whole else "length"}]}


def to_chat_usage(usage: object) -> object:
    """Return the Responses API's usage under the field names of chat completions."""
    if not isinstance(usage, dict):
        return usage
    return {
        "prompt_tokens": usage.get("input_tokens"),
        "completion_tokens": usage.get("output_tokens"),
        "prompt_tokens_details": usage.get("input_tokens_details"),
        "completion_tokens_details": usage.get("output_tokens_details"),
        "cost_in_usd_ticks": usage.get("cost_in_usd_ticks"),
    }
