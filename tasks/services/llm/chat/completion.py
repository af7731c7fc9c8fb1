"""Chat completions as a type of our own: parsed in one place, whatever shape a server sends.

Nothing here raises: what can't be read becomes the completion's `problem`, so that a reply that was
paid for is recorded before it is refused. Text that a server supplies is redacted here, once.
"""

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from tasks.redaction import clean_text, redact, shorten, show_value

XAI_TICKS_PER_USD = 1e10
MOST_TOKENS = 10**9
MOST_TOOL_CALLS = 16
# Estimates of input tokens err by what a provider counts for an image: up to ten times between models.
ABSURD_INPUT, ABSURD_OUTPUT, ABSURD_USD = 32, 4, 100


@dataclass(frozen=True)
class Usage:
    """Tokens of one reply; cached and image ones are among the input, reasoning among the output."""

    input_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    reported_usd: float | None = None
    """What the provider says it costs, where it does."""


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks to call."""

    name: str
    arguments: str
    call_id: str

    def to_wire(self) -> dict[str, object]:
        """Return the call as a chat message holds it."""
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
    """Return a completion with what its first choice holds. Raises ShapeError."""
    if value.get("error") and not value.get("choices"):
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
        reasoning=clean_string(message.get("reasoning_content") or message.get("reasoning")),
        citations=parse_citations(annotations),
    )


def parse_content(value: object) -> tuple[str | None, str]:
    """Return the text of a message and of refusals in it: content is a string or a list of parts."""
    if value is None or isinstance(value, str):
        return (None if value is None else clean_string(value)), ""
    texts, refusals = [], []
    for part in expect(value, list, "content"):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = expect(part, dict, "a part of content").get("type")
        if kind in ("text", "output_text"):
            texts.append(expect(part.get("text"), str, "text"))
        elif kind == "refusal":
            refusals.append(expect(part.get("refusal"), str, "refusal"))
    return clean_string("".join(texts)) or None, "".join(refusals)


def parse_tool_calls(value: object) -> tuple[ToolCall, ...]:
    """Return the functions to call, the first MOST_TOOL_CALLS of them. Raises ShapeError."""
    calls = []
    for number, call in enumerate(expect(value or [], list, "tool_calls")[:MOST_TOOL_CALLS]):
        function = expect(expect(call, dict, "a tool call").get("function"), dict, "function")
        arguments = function.get("arguments") or ""
        if isinstance(arguments, dict):  # some servers send the object itself
            arguments = json.dumps(arguments)
        call_id = call.get("id")
        calls.append(
            ToolCall(
                name=clean_line(expect(function.get("name"), str, "function.name"), limit=100),
                arguments=clean_string(expect(arguments, str, "function.arguments")),
                call_id=call_id if isinstance(call_id, str) and call_id else f"call_{number}",
            )
        )
    return tuple(calls)


def parse_citations(value: object) -> tuple[str, ...]:
    """Return the addresses that a reply cites, in order, each once."""
    urls = []
    for note in value if isinstance(value, list) else []:
        if isinstance(note, dict) and note.get("type") == "url_citation":
            inner = note.get("url_citation")
            urls.append((inner if isinstance(inner, dict) else note).get("url"))
    found = [clean_line(url, limit=2000) for url in urls if isinstance(url, str)]
    return tuple(dict.fromkeys(url for url in found if url.startswith(("https://", "http://"))))


def parse_usage(value: object) -> tuple[Usage, str]:
    """Return the usage that a reply reports, in any provider's words, and why it can't be trusted, or nothing."""
    if value is None or value == {}:
        return Usage(), "no usage was reported"
    try:
        usage = expect(value, dict, "usage")
        inputs = expect(usage.get("prompt_tokens_details") or {}, dict, "prompt_tokens_details")
        outputs = expect(usage.get("completion_tokens_details") or {}, dict, "completion_tokens_details")
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


def bound_usage(completion: ChatCompletion, most: Usage, *, worst_usd: float | None) -> ChatCompletion:
    """Return a completion whose usage is the reservation where it reports none, or an impossible one.

    Args:
        most: the tokens that were reserved.
        worst_usd: their price; None where it is unknown.

    """
    usage = completion.usage
    fault = completion.usage_fault
    if not fault and usage.reported_usd is None and not usage.input_tokens:
        fault = "no input tokens were reported"
    if not fault and usage.reported_usd is None and not usage.output_tokens and (completion.content or "").strip():
        fault = "no output tokens were reported for a reply with text"
    if not fault and usage.cached_tokens > usage.input_tokens:
        fault = f"{usage.cached_tokens} cached tokens of {usage.input_tokens}"
    for name, count, limit in (
        ("input", usage.input_tokens, ABSURD_INPUT * most.input_tokens + 1000),
        ("output", usage.output_tokens, ABSURD_OUTPUT * most.output_tokens + 1000),
    ):
        if not fault and count > limit:
            fault = f"{count} {name} tokens, where at most {limit} are possible"
    if not fault and worst_usd and (usage.reported_usd or 0.0) > ABSURD_USD * worst_usd:
        fault = f"a cost of {usage.reported_usd:.4g} USD, where {worst_usd:.4g} were reserved"
    return replace(completion, usage=most, usage_fault=fault) if fault else completion


def read_count(value: object, name: str) -> int:
    """Return a number of tokens, 0 where there is none. Raises ShapeError."""
    if value is None:
        return 0
    if not is_finite(value) or value != int(value) or not 0 <= value <= MOST_TOKENS:
        raise ShapeError(f"{name} is {show_value(value, limit=60)}")
    return int(value)


def read_usd(value: object, name: str) -> float | None:
    """Return money, None where there is none. Raises ShapeError."""
    if value is None:
        return None
    if not is_finite(value) or value < 0:
        raise ShapeError(f"{name} is {show_value(value, limit=60)}")
    return float(value)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number that a float can hold; true and false are none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def read_error(value: object) -> str:
    """Return what a server says is wrong, on one line: each puts it elsewhere."""
    for _ in range(3):
        if not isinstance(value, dict):
            break
        value = value.get("message") or value.get("detail") or value.get("error") or str(value)
    return clean_line(value if isinstance(value, str) else str(value), limit=200)


def expect(value: object, kind: type, name: str) -> Any:
    """Return a value of a kind. Raises ShapeError."""
    if not isinstance(value, kind):
        raise ShapeError(f"{name} is {name_type(value)}")
    return value


def name_type(value: object) -> str:
    """Return a value's JSON type with an article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def clean_string(value: object) -> str:
    """Return a server's text with secrets masked and half surrogate pairs replaced; other types are empty."""
    if not isinstance(value, str):
        return ""
    return redact(value.encode("utf-8", "replace").decode())


def clean_line(value: object, *, limit: int) -> str:
    """Return a server's text as one short line."""
    return shorten(clean_text(" ".join(clean_string(value).split())), limit=limit)
