"""Chat completions as a type of our own, parsed in one place from whatever a server sends.

`parse_completion` does not raise: an unreadable reply becomes a completion with a `problem`, so that it is recorded
as paid before it is refused. Text from a server is redacted here, once.
"""

import json
import math
from dataclasses import dataclass, field, replace
from typing import TypeGuard, TypeVar

from tasks.redaction import clean_text, redact, shorten, show_value

Kind = TypeVar("Kind")
XAI_TICKS_PER_USD = 1e10
MAX_TOKENS = 10**9
MAX_TOOL_CALLS = 16
# Factors over the reservation beyond which a report is false, not just larger than estimated: what models count for
# one image differs up to tenfold.
MAX_INPUT_FACTOR, MAX_OUTPUT_FACTOR, MAX_COST_FACTOR = 32, 4, 100


@dataclass(frozen=True)
class Usage:
    """Tokens of one reply; cached and image tokens are part of the input, reasoning tokens of the output."""

    input_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    reported_usd: float | None = None
    """The cost as reported by the provider, where it is."""


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks to call."""

    name: str
    arguments: str
    call_id: str

    def to_wire(self) -> dict[str, object]:
        """Return the call as an entry of an assistant message's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(frozen=True)
class ChatCompletion:
    """One reply."""

    content: str | None = None
    refusal: str = ""
    finish_reason: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    citations: tuple[str, ...] = ()
    model: str = ""
    usage: Usage = Usage()
    usage_fault: str = ""
    """Why the usage is not the provider's but the reservation; empty where it is the provider's."""
    problem: str = ""
    """Why the reply can't be read; empty where it can."""
    raw: object = field(default=None, repr=False, compare=False)
    """The reply as it was sent."""


class ShapeError(ValueError):
    """A part of a reply has an unexpected shape."""


def parse_completion(value: object) -> ChatCompletion:
    """Return a reply of any shape as a completion."""
    if not isinstance(value, dict):
        return ChatCompletion(problem=f"the reply is {name_type(value)}, not an object", raw=value)
    # Usage before choices: a reply whose choices can't be read is still charged by its usage.
    usage, fault = parse_usage(value.get("usage"))
    model = clean_line(value.get("model"), limit=200)
    plain = ChatCompletion(model=model, usage=usage, usage_fault=fault, raw=value)
    try:
        return parse_choice(value, plain)
    except ShapeError as error:
        return replace(plain, problem=str(error))
    except RecursionError:
        return replace(plain, problem="the reply nests too deeply")


def parse_choice(value: dict[str, object], plain: ChatCompletion) -> ChatCompletion:
    """Return a completion with the fields of its first choice. Raises ShapeError."""
    if value.get("error") and not value.get("choices"):  # an error reported with status 200
        raise ShapeError(f"the provider reports an error: {read_error(value['error'])}")
    choices = value.get("choices")
    if choices is None or choices == []:
        return plain
    choice = expect(expect(choices, list, "choices")[0], dict, "choices[0]")
    message = expect(choice.get("message") or {}, dict, "message")
    content, refusals = parse_content(message.get("content"))
    refusal = expect(message.get("refusal") or "", str, "refusal") or refusals
    annotations = message.get("annotations")
    return replace(
        plain,
        content=content,
        refusal=clean_line(refusal, limit=500),
        finish_reason=expect(choice.get("finish_reason") or "", str, "finish_reason"),
        tool_calls=parse_tool_calls(message.get("tool_calls")),
        # No standard field: `reasoning_content` at xAI and DeepSeek, `reasoning` at OpenRouter.
        reasoning=clean_string(message.get("reasoning_content") or message.get("reasoning")),
        citations=parse_citations(annotations),
    )


def parse_content(value: object) -> tuple[str | None, str]:
    """Return a message's text and its refusals' text; content is a string or a list of parts."""
    if value is None or isinstance(value, str):
        return (None if value is None else clean_string(value)), ""
    texts, refusals = [], []
    for part in expect(value, list, "content"):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = expect(part, dict, "a part of content").get("type")
        # `output_text` is the name of the Responses API, see web_search.to_chat.
        if kind in ("text", "output_text"):
            texts.append(expect(part.get("text"), str, "text"))
        elif kind == "refusal":
            refusals.append(expect(part.get("refusal"), str, "refusal"))
    return clean_string("".join(texts)) or None, "".join(refusals)


def parse_tool_calls(value: object) -> tuple[ToolCall, ...]:
    """Return the first MAX_TOOL_CALLS tool calls. Raises ShapeError."""
    calls = []
    for number, call in enumerate(expect(value or [], list, "tool_calls")[:MAX_TOOL_CALLS]):
        function = expect(expect(call, dict, "a tool call").get("function"), dict, "function")
        arguments = function.get("arguments") or ""
        if isinstance(arguments, dict):  # some servers send the object itself
            arguments = json.dumps(arguments)
        call_id = call.get("id")
        calls.append(
            ToolCall(
                name=clean_line(expect(function.get("name"), str, "function.name"), limit=100),
                arguments=clean_string(expect(arguments, str, "function.arguments")),
                # Some servers omit ids, which the following tool messages refer to.
                call_id=call_id if isinstance(call_id, str) and call_id else f"call_{number}",
            )
        )
    return tuple(calls)


def parse_citations(value: object) -> tuple[str, ...]:
    """Return the distinct http(s) URLs that a reply cites, in order."""
    urls = []
    for note in value if isinstance(value, list) else []:
        if isinstance(note, dict) and note.get("type") == "url_citation":
            # Chat completions nest the URL; annotations of the Responses API have it at the top level.
            inner = note.get("url_citation")
            urls.append((inner if isinstance(inner, dict) else note).get("url"))
    found = [clean_line(url, limit=2000) for url in urls if isinstance(url, str)]
    return tuple(dict.fromkeys(url for url in found if url.startswith(("https://", "http://"))))


def parse_usage(value: object) -> tuple[Usage, str]:
    """Return the reported usage, in any provider's field names, and why it can't be read, or an empty string."""
    if value is None or value == {}:
        return Usage(), "no usage was reported"
    try:
        usage = expect(value, dict, "usage")
        inputs = expect(usage.get("prompt_tokens_details") or {}, dict, "prompt_tokens_details")
        outputs = expect(usage.get("completion_tokens_details") or {}, dict, "completion_tokens_details")
        # OpenRouter reports `cost` in USD, xAI `cost_in_usd_ticks`.
        reported = read_usd(usage.get("cost"), "cost")
        if usage.get("cost_in_usd_ticks") is not None:
            reported = (read_usd(usage["cost_in_usd_ticks"], "cost_in_usd_ticks") or 0.0) / XAI_TICKS_PER_USD
        return Usage(
            input_tokens=read_count(usage.get("prompt_tokens"), "prompt_tokens"),
            cached_tokens=read_count(inputs.get("cached_tokens"), "cached_tokens"),
            image_tokens=read_count(inputs.get("image_tokens"), "image_tokens"),
            output_tokens=read_count(usage.get("completion_tokens"), "completion_tokens"),
            reasoning_tokens=read_count(outputs.get("reasoning_tokens"), "reasoning_tokens"),
            reported_usd=reported,
        ), ""
    except ShapeError as error:
        return Usage(), str(error)
    except RecursionError:
        return Usage(), "the usage nests too deeply"


def bound_usage(completion: ChatCompletion, max_usage: Usage, *, worst_usd: float | None) -> ChatCompletion:
    """Return a completion whose usage is the reservation where the reported one is missing or implausible.

    Args:
        max_usage: the tokens that were reserved.
        worst_usd: their price in USD; None where it is unknown.

    """
    usage = completion.usage
    fault = completion.usage_fault
    # Token counts of zero would make calls free of charge to the budget, unless the provider reports a price.
    if not fault and usage.reported_usd is None and not usage.input_tokens:
        fault = "no input tokens were reported"
    if not fault and usage.reported_usd is None and not usage.output_tokens and (completion.content or "").strip():
        fault = "no output tokens were reported for a reply with text"
    # The price of uncached input, input - cached, would be negative.
    if not fault and usage.cached_tokens > usage.input_tokens:
        fault = f"{usage.cached_tokens} cached tokens of {usage.input_tokens}"
    for name, count, limit in (
        ("input", usage.input_tokens, MAX_INPUT_FACTOR * max_usage.input_tokens + 1000),
        ("output", usage.output_tokens, MAX_OUTPUT_FACTOR * max_usage.output_tokens + 1000),
    ):
        if not fault and count > limit:
            fault = f"{count} {name} tokens, where at most {limit} are possible"
    if not fault and worst_usd and (usage.reported_usd or 0.0) > MAX_COST_FACTOR * worst_usd:
        fault = f"a cost of {usage.reported_usd:.4g} USD, where {worst_usd:.4g} were reserved"
    return replace(completion, usage=max_usage, usage_fault=fault) if fault else completion


def read_count(value: object, name: str) -> int:
    """Return a token count in [0, MAX_TOKENS], 0 for null. Raises ShapeError."""
    if value is None:
        return 0
    # A whole float such as 3.0 is accepted: JSON does not distinguish the two.
    if not is_finite(value) or value != int(value) or not 0 <= value <= MAX_TOKENS:
        raise ShapeError(f"{name} is {show_value(value, limit=60)}")
    return int(value)


def read_usd(value: object, name: str) -> float | None:
    """Return a non-negative amount of money, None for null. Raises ShapeError."""
    if value is None:
        return None
    if not is_finite(value) or value < 0:
        raise ShapeError(f"{name} is {show_value(value, limit=60)}")
    return float(value)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number that a finite float can hold; booleans are not numbers."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def read_error(value: object) -> str:
    """Return a server's error message on one line, from whichever field holds it."""
    for _ in range(3):  # levels of nesting, such as {"error": {"message": ...}}
        if not isinstance(value, dict):
            break
        value = value.get("message") or value.get("detail") or value.get("error") or str(value)
    return clean_line(value if isinstance(value, str) else str(value), limit=200)


def expect(value: object, kind: type[Kind], name: str) -> Kind:
    """Return a value of a kind. Raises ShapeError."""
    if not isinstance(value, kind):
        raise ShapeError(f"{name} is {name_type(value)}")
    return value


def name_type(value: object) -> str:
    """Return a value's JSON type with an article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def clean_string(value: object) -> str:
    """Return a server's text with secrets masked and lone surrogates replaced; empty for other types."""
    if not isinstance(value, str):
        return ""
    return redact(value.encode("utf-8", "replace").decode())


def clean_line(value: object, *, limit: int) -> str:
    """Return a server's text as one short line."""
    return shorten(clean_text(" ".join(clean_string(value).split())), limit=limit)
