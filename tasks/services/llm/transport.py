"""Talk to a provider through the `openai` package: one retry layer, one deadline, our errors."""

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tasks.errors import BudgetExceeded, ConfigError, LikenessError, ServiceUnavailable
from tasks.services.llm.config import ProfileConfig

LONGEST_PAUSE_SECONDS = 60.0
# Words by which providers say that money, not pace, is the limit: waiting would not help.
QUOTA_WORDS = ("insufficient_quota", "quota", "credit", "billing", "spending limit")


def make_client(profile: ProfileConfig, *, start_local: Callable[[], str] | None) -> Any:
    """Return an openai client. Raises ConfigError where the key is not in the environment."""
    import openai

    base_url = profile.base_url
    if base_url is None:
        if start_local is None:
            raise ConfigError("this profile needs the mini vision server, which is not running here")
        base_url = start_local()
    # Retries belong to one layer, ours: the SDK would post a batch twice without a way to tell.
    return openai.OpenAI(base_url=base_url, api_key=read_key(profile), max_retries=0)


def read_key(profile: ProfileConfig) -> str:
    """Return the profile's key. Raises ConfigError where it is not in the environment."""
    if not profile.api_key_variable:
        return "local"
    key = os.environ.get(profile.api_key_variable, "")
    if not key:
        raise ConfigError(f"{profile.api_key_variable} is not set; export it, or use llm=local with the drawn world")
    return key


def complete(client: Any, body: dict[str, Any], *, timeout_seconds: float) -> dict[str, Any]:
    """Return a chat completion as plain data, within a total time: a server that drips is left too.

    The SDK's own timeout is between two bytes, so it would wait for one that sends a byte now and then.
    """
    deadline = time.monotonic() + timeout_seconds
    create = client.chat.completions.with_streaming_response.create
    data = bytearray()
    with create(**openai_arguments(body), timeout=timeout_seconds) as response:
        for chunk in response.iter_bytes():
            data += chunk
            if time.monotonic() > deadline:
                raise ServiceUnavailable(f"the answer was not whole after {timeout_seconds:.0f} s; run again to go on")
    try:
        completion = json.loads(bytes(data))
    except ValueError as error:
        raise ServiceUnavailable(f"the answer is no JSON: {bytes(data[:60])!r}; run again to go on") from error
    if not isinstance(completion, dict):
        raise ServiceUnavailable("the answer is no chat completion; run again to go on")
    return completion


def complete_streaming(
    client: Any, body: dict[str, Any], *, timeout_seconds: float, on_text: Callable[[str], None]
) -> dict[str, Any]:
    """Show a reply as it comes and return it whole, as `complete` would.

    An interrupt closes the connection, by which providers stop to generate.
    """
    deadline = time.monotonic() + timeout_seconds
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    message: dict[str, Any] = {"role": "assistant", "content": None}
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": None}
    whole: dict[str, Any] = {"choices": [choice]}
    try:
        with client.chat.completions.create(**openai_arguments(body), timeout=timeout_seconds) as chunks:
            for chunk in chunks:
                if time.monotonic() > deadline:
                    raise ServiceUnavailable(f"the answer was not whole after {timeout_seconds:.0f} s; ask again")
                told = chunk.model_dump()
                whole |= {"model": told.get("model"), "usage": told.get("usage") or whole.get("usage")}
                for part in told.get("choices") or []:
                    choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
                    add_delta(message, part.get("delta") or {}, on_text)
    except ValueError as error:  # the SDK lets what isn't JSON through
        raise ServiceUnavailable("the answer is no stream of JSON; ask again") from error
    if choice["finish_reason"] is None:
        raise ServiceUnavailable("the answer broke off; ask again")
    return whole


def add_delta(message: dict[str, Any], delta: dict[str, Any], on_text: Callable[[str], None]) -> None:
    """Add one piece of a streamed reply to what came before."""
    if delta.get("content"):
        message["content"] = (message["content"] or "") + delta["content"]
        on_text(delta["content"])
    for part in delta.get("tool_calls") or []:
        calls = message.setdefault("tool_calls", [])
        while len(calls) <= part["index"]:
            calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = calls[part["index"]], part.get("function") or {}
        call["id"] = part.get("id") or call["id"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


# What the SDK has arguments for; anything else a provider understands goes beside them.
KNOWN_ARGUMENTS = frozenset(
    {"model", "messages", "max_completion_tokens", "response_format", "tools", "tool_choice", "reasoning_effort",
     "stream", "stream_options", "temperature", "seed"}
)  # fmt: skip


def openai_arguments(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body as arguments of the SDK's call."""
    known = {key: value for key, value in body.items() if key in KNOWN_ARGUMENTS}
    others = {key: value for key, value in body.items() if key not in KNOWN_ARGUMENTS}
    return {**known, **({"extra_body": others} if others else {})}


def call_with_retries(
    call: Callable[[float], Any],
    profile: ProfileConfig,
    *,
    on_failure: Callable[[LikenessError], None] = lambda error: None,
) -> Any:
    """Call a provider until it answers, with growing pauses, within the profile's total time."""
    deadline = time.monotonic() + profile.timeout_seconds
    for attempt in range(1, profile.max_attempts + 1):
        try:
            with translated(profile):
                return call(max(0.1, deadline - time.monotonic()))
        except LikenessError as error:
            on_failure(error)
            if not error.is_retryable or attempt == profile.max_attempts:
                raise
            pause = choose_pause(error, attempt)
            if time.monotonic() + pause > deadline:
                raise
            time.sleep(pause)
    raise AssertionError("unreachable")


def choose_pause(error: LikenessError, attempt: int) -> float:
    """Return seconds to wait: what the provider asks for, else doubling with jitter."""
    response = getattr(error.__cause__, "response", None)
    header = response.headers.get("retry-after", "") if response is not None else ""
    try:
        asked = float(header)
    except ValueError:
        asked = -1.0
    if asked >= 0:  # nan and negative numbers are no answer
        return asked
    return float(min(LONGEST_PAUSE_SECONDS, 0.5 * 2**attempt) * random.uniform(0.5, 1.0))


def is_surely_unpaid(error: LikenessError) -> bool:
    """Whether a failed call can't have been billed: it was refused, or nobody was there."""
    import openai

    cause = error.__cause__
    if isinstance(cause, openai.APITimeoutError):
        return False  # it may be at work still
    if isinstance(cause, openai.APIConnectionError):
        return "refused" in repr(cause.__cause__).lower()
    return isinstance(cause, openai.APIStatusError) and cause.status_code < 500


@contextmanager
def translated(profile: ProfileConfig) -> Iterator[None]:
    """Turn the SDK's errors into ours."""
    import httpx2
    import openai

    where = profile.base_url or "the mini vision server"
    try:
        yield
    except httpx2.HTTPError as error:  # while the body is read; before that the SDK has errors of its own
        raise ServiceUnavailable(f"{where} broke off its answer: {error}; run again to go on") from error
    except openai.APIConnectionError as error:
        raise ServiceUnavailable(f"{where} does not answer: {error}; run again to go on") from error
    except openai.APIStatusError as error:
        raise sort_status(error, profile, where) from error
    except openai.OpenAIError as error:
        raise ServiceUnavailable(f"{where} sent what can't be read: {error}") from error


def sort_status(error: Any, profile: ProfileConfig, where: str) -> LikenessError:
    """Return our error for an HTTP status: what the operator should do."""
    status, told = int(error.status_code), read_reason(error, profile)
    whole = f"{error} {error.body}".lower()  # the SDK keeps codes such as insufficient_quota out of its message
    is_quota = status == 429 and any(word in whole for word in QUOTA_WORDS)
    if status in (401, 403):
        return ConfigError(f"{where} refuses the key in {profile.api_key_variable}")
    if status == 404:
        return ConfigError(f"{where} does not serve {profile.model}; `likeness doctor` lists what it serves")
    if status in (400, 413, 422):
        return ConfigError(f"{where} refuses the request: {told}")
    if is_quota or status == 402:
        return BudgetExceeded(f"the quota at {where} is used up; what was answered is kept: pay, and run again")
    reason = "asks to wait (rate limit)" if status == 429 else f"answered {status}: {told}"
    return ServiceUnavailable(f"{where} {reason}")


def read_reason(error: Any, profile: ProfileConfig) -> str:
    """Return what a server says is wrong: each puts it elsewhere, and some say the key with it."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body
    told = " ".join(str(body or error.message).split())
    key = os.environ.get(profile.api_key_variable or "", "")
    return (told.replace(key, "***") if key else told)[:200]
