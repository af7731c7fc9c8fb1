"""Check a profile's declared capabilities by one cheap call each, and say which setting to change."""

import datetime
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from pydantic import BaseModel, Field

from tasks.errors import LikenessError, ReplyInvalid
from tasks.services.llm.budget.ledger import LedgerRow
from tasks.services.llm.chat.body import ChatBody, make_body
from tasks.services.llm.chat.capability_probe import try_response_format
from tasks.services.llm.chat.completion import ChatCompletion, clean_line
from tasks.services.llm.chat.json_schema import parse_reply
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.chat.response_format import TOOL, ask_for, set_reasoning
from tasks.services.llm.chat.transport import parse_body, read_key, translated
from tasks.services.llm.config import ProfileConfig
from tasks.services.llm.errors import EndpointUnavailable, RequestRefused
from tasks.services.llm.service import LlmService

SOON_DAYS = 60


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    is_good: bool
    detail: str


class ColorSeen(BaseModel):
    """The reply to a picture of one color."""

    color: Literal["red", "green", "blue"] = Field(description="the color that fills the picture")


class Arguments(BaseModel):
    """Any JSON object."""


def examine(llm: LlmService, name: str) -> Iterator[Finding]:
    """Yield the findings on one profile; stop at the first that shows that no call can succeed."""
    profile = llm.config.profiles[name]
    yield check_retirement(profile, today=datetime.datetime.now(datetime.UTC).date())
    try:
        read_key(profile)  # raises ConfigError, before any request, where the variable is not set
        listed = check_listed(llm, name)
    except RequestRefused as error:
        yield Finding("key" if error.status in (401, 403) else "models", False, str(error))
        return
    except EndpointUnavailable as error:
        yield Finding("models", False, str(error))
        return
    except LikenessError as error:
        yield Finding("key", False, str(error))
        return
    yield listed
    yield from run_checks(llm, name)


def run_checks(llm: LlmService, name: str) -> Iterator[Finding]:
    """Yield a finding per check, and one on the key with the first check that was answered.

    The list of models does not prove a key: some providers serve it to everybody.
    """
    key = llm.config.profiles[name].api_key_variable
    is_key_known = False
    for check, try_out in CHECKS.items():
        try:
            detail, is_good = try_out(llm, name), True
        except RequestRefused as error:
            if error.status in (401, 403):
                yield Finding("key", False, str(error))
                return
            detail, is_good = str(error), False
        except ReplyInvalid as error:
            detail, is_good = str(error), False
        except LikenessError as error:  # such as a timeout, which says nothing on the key or on other checks
            yield Finding(check, False, str(error))
            continue
        if not is_key_known:
            is_key_known = True
            yield Finding("key", True, f"{key}, accepted" if key else "none needed")
        if detail:
            yield Finding(check, is_good, detail)


def check_retirement(profile: ProfileConfig, *, today: datetime.date) -> Finding:
    """Check the model's retirement date; one within SOON_DAYS counts as a fault."""
    if profile.retired_on is None:
        return Finding("retirement", True, "none announced in its profile")
    days = (profile.retired_on - today).days
    if days <= 0:
        return Finding("retirement", False, f"{profile.model} was retired on {profile.retired_on}; choose another")
    is_good = days > SOON_DAYS
    return Finding("retirement", is_good, f"on {profile.retired_on}, in {days} days")


def check_listed(llm: LlmService, name: str) -> Finding:
    """Look for the model in the provider's list, and for a shutdown date there."""
    profile = llm.config.profiles[name]
    with translated(profile):
        # Not through `send`: listing models is free, so nothing has to be reserved.
        page = parse_body(llm.client(name).models.with_raw_response.list(timeout=30).content)
    rows = page.get("data") if isinstance(page, dict) else None
    models = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    listed = {clean_line(model.get("id"), limit=100): model for model in models}
    if profile.model not in listed:
        near = [model for model in listed if profile.is_served(model)]
        some = ", ".join(near or sorted(listed)[:6]) or "nothing"
        return Finding("models", False, f"{profile.model} is not listed; listed: {some}")
    shutdown = listed[profile.model].get("shutdown_date")
    if shutdown:
        return Finding("models", False, f"listed, to be shut down on {clean_line(str(shutdown), limit=40)}")
    return Finding("models", True, f"listed, one of {len(listed)}")


def try_response(llm: LlmService, name: str) -> str:
    """Request JSON that only a server that enforces the schema returns."""
    profile = llm.config.profiles[name]
    found = llm.response_format(name)
    if profile.capabilities.response_format == "auto":
        return f"{found}, probed"
    row = LedgerRow("doctor", name, profile.model, outcome="")
    problem = try_response_format(profile, found, call=lambda body: llm.call(body, row=row))
    if problem:
        raise ReplyInvalid(f"{problem}; set .capabilities.response_format=auto")
    return found


def probe_image_input(llm: LlmService, name: str) -> str:
    """Show a red picture and ask for its color."""
    profile = llm.config.profiles[name]
    if not profile.capabilities.images:
        return ""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (225, 20, 20)).save(buffer, format="PNG")
    spec = RequestSpec("You look at pictures.", ("Which color fills it?", buffer.getvalue()), ColorSeen)
    body = spec.body(profile, llm.response_format(name))
    row = LedgerRow("doctor", name, profile.model, outcome="")
    answer = llm.accept(spec, llm.send(body, row=row), row=row)
    if not llm.is_comparable(answer):
        raise ReplyInvalid(f"{answer.served_model} answers in its place: set .model to it, with its own prices")
    if answer.reply.color != "red":
        raise ReplyInvalid(f"answers {answer.reply.color} for a red image; does the model support images?")
    return f"supported; served by {answer.served_model or 'an unnamed model'}"


def try_tool(llm: LlmService, name: str) -> str:
    """Force a tool call."""
    profile = llm.config.profiles[name]
    if not profile.capabilities.tools:
        return ""
    completion = call(llm, name, ask_for(make_question(profile, "Which color is the sky?"), ColorSeen, "tool"))
    if not completion.tool_calls or completion.tool_calls[0].name != TOOL:
        raise ReplyInvalid(f"calls no tool{explain(completion)}; set .capabilities.tools=false")
    parse_reply(Arguments, completion.tool_calls[0].arguments)
    return "supported"


def try_reasoning(llm: LlmService, name: str) -> str:
    """Switch reasoning on and off."""
    profile = llm.config.profiles[name]
    if profile.capabilities.reasoning == "none":
        return ""
    counts = []
    for is_reasoning in (False, True):
        body = set_reasoning(make_question(profile, "Is 391 prime?"), profile, is_reasoning=is_reasoning)
        counts.append(call(llm, name, body).usage.reasoning_tokens)
    if counts[0]:
        raise ReplyInvalid(f"reasons ({counts[0]} tokens) although reasoning is disabled; set .capabilities.reasoning")
    return f"off: 0 tokens, on: {counts[1]}"


def try_stream(llm: LlmService, name: str) -> str:
    """Stream a reply."""
    profile = llm.config.profiles[name]
    if not profile.capabilities.streaming:
        return ""
    pieces: list[str] = []
    row = LedgerRow("doctor", name, profile.model, outcome="")
    try:
        completion = llm.send(make_question(profile, "Say hello."), row=row, on_text=pieces.append)
    except EndpointUnavailable as error:
        if error.status is not None:
            raise
        # Without a status, the stream itself was unreadable; `send` has recorded the attempt.
        completion = ChatCompletion()
    else:
        llm.record_completion(completion, row=row)
    if not completion.content:
        raise ReplyInvalid(f"no text was streamed{explain(completion)}; set .capabilities.streaming=false")
    return f"{len(completion.content)} characters"


def try_batch(llm: LlmService, name: str) -> str:
    """List the newest batch job: a provider without batches doesn't know the address."""
    kind = llm.config.profiles[name].capabilities.batch
    client = llm.client(name)
    try:
        with translated(llm.config.profiles[name]):
            if kind == "openai":
                client.batches.with_raw_response.list(limit=1, timeout=30)
            elif kind == "xai":
                client.get("/batches", cast_to=object, options={"params": {"limit": 1}})
            else:
                return ""
    except RequestRefused as error:
        if error.status in (401, 403):
            raise
        raise ReplyInvalid("has no batch API; set .capabilities.batch=none, or local") from error
    return "supported"


# Web search is not tried: it costs a cent a call.
CHECKS: dict[str, Callable[[LlmService, str], str]] = {
    "response format": try_response, "images": probe_image_input, "tools": try_tool, "reasoning": try_reasoning,
    "stream": try_stream, "batch": try_batch,
}  # fmt: skip


def make_question(profile: ProfileConfig, text: str) -> ChatBody:
    """Return a body of one user message."""
    return make_body(profile, [{"role": "user", "content": text}])


def explain(completion: ChatCompletion) -> str:
    """Return why a reply can't be read, as the end of a clause."""
    return f" ({completion.problem})" if completion.problem else ""


def call(llm: LlmService, name: str, body: ChatBody) -> ChatCompletion:
    """Send a body and record its cost under the role `doctor`."""
    return llm.call(body, row=LedgerRow("doctor", name, body["model"], outcome=""))
