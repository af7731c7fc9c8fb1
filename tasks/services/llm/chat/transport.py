"""Talk to a provider through the `openai` package: bounded reads, one deadline, our errors."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from tasks.errors import ConfigError, LikenessError
from tasks.redaction import register_secret, show_value
from tasks.services.llm.chat.completion import read_error
from tasks.services.llm.chat.streaming import StreamReader, TextCleaner
from tasks.services.llm.config import ProfileConfig
from tasks.services.llm.errors import EndpointUnavailable, QuotaExceeded, RequestRefused

if TYPE_CHECKING:
    import httpx2
    from openai import OpenAI

MOST_BYTES = 16_000_000  # of a reply: more is no chat completion
# Words by which providers say that money, not pace, is the limit: waiting would not help.
QUOTA_WORDS = ("insufficient_quota", "quota", "credit", "billing", "spending limit")


class ByteStream(Protocol):
    """A response whose body is read piece by piece."""

    def iter_bytes(self) -> Iterator[bytes]:
        """Yield the body's pieces."""


def make_client(profile: ProfileConfig, *, start_local: Callable[[], str] | None) -> "OpenAI":
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
    """Return the profile's key, masked from now on. Raises ConfigError where it is not in the environment."""
    if not profile.api_key_variable:
        return "local"
    key = os.environ.get(profile.api_key_variable, "")
    if not key:
        raise ConfigError(f"{profile.api_key_variable} is not set; export it, or use llm=local with the drawn world")
    return register_secret(key)


def complete(client: "OpenAI", body: dict[str, Any], *, timeout_seconds: float) -> dict[str, object]:
    """Return the JSON object of a chat completion, within a total time."""
    deadline = time.monotonic() + timeout_seconds
    create = client.chat.completions.with_streaming_response.create
    with create(**openai_arguments(body), timeout=timeout_seconds) as response:
        return read_object(response, deadline=deadline, seconds=timeout_seconds)


def read_object(response: "ByteStream", *, deadline: float, seconds: float) -> dict[str, object]:
    """Return a response's JSON object. Raises EndpointUnavailable for anything else.

    The SDK's own timeout is between two bytes, so it would wait for a server that sends one now and then.
    """
    data = bytearray()
    for chunk in response.iter_bytes():
        data += chunk
        if time.monotonic() > deadline:
            raise EndpointUnavailable(f"the answer was not whole after {seconds:.0f} s; run again to resume")
        if len(data) > MOST_BYTES:
            raise EndpointUnavailable(f"the answer is longer than {MOST_BYTES / 1e6:.0f} MB; run again to resume")
    value = parse_body(bytes(data))
    if not isinstance(value, dict):
        raise EndpointUnavailable(f"the answer is no JSON object: {show_value(bytes(data[:60]))}; run again to resume")
    return value


def parse_body(data: bytes) -> Any:
    """Return parsed JSON. Raises EndpointUnavailable for anything else, deep nesting included."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EndpointUnavailable(f"the answer is no JSON: {show_value(data[:60])}; run again to resume") from error


def complete_streaming(
    client: "OpenAI", body: dict[str, Any], *, timeout_seconds: float, on_text: Callable[[str], None]
) -> dict[str, object]:
    """Show a reply as it comes and return it whole, as `complete` would.

    An interrupt closes the connection, by which providers stop generating.
    """
    deadline = time.monotonic() + timeout_seconds
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    cleaner = TextCleaner(on_text)
    reader = StreamReader(cleaner.feed)
    create = client.chat.completions.with_streaming_response.create
    size = 0
    with create(**openai_arguments(body), timeout=timeout_seconds) as response:
        for line in response.iter_lines():
            size += len(line)
            if time.monotonic() > deadline:
                raise EndpointUnavailable(f"the answer was not whole after {timeout_seconds:.0f} s; ask again")
            if size > MOST_BYTES:
                raise EndpointUnavailable(f"the answer is longer than {MOST_BYTES / 1e6:.0f} MB; ask again")
            reader.feed(line)
    whole = reader.finish()
    cleaner.flush()
    return whole


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


@contextmanager
def translated(profile: ProfileConfig) -> Iterator[None]:
    """Turn the SDK's errors into ours."""
    import httpx2
    import openai

    where = profile.base_url or "the mini vision server"
    try:
        yield
    except httpx2.HTTPError as error:  # while the body is read; before that the SDK has errors of its own
        raise EndpointUnavailable(f"{where} broke off its answer: {error}; run again to resume") from error
    except openai.APIConnectionError as error:
        cause = error.__cause__
        was_sent = not isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.UnsupportedProtocol)
        reason = f"{error} ({cause})" if cause and str(cause) else str(error)
        raise EndpointUnavailable(
            f"{where} does not answer: {reason}; check the address and that it runs, then run again to resume",
            is_billable=was_sent,
        ) from error
    except openai.APIStatusError as error:
        raise map_http_error(error, profile, where) from error
    except (openai.OpenAIError, ValueError, RecursionError) as error:  # the SDK lets what isn't JSON through
        raise EndpointUnavailable(f"{where} sent what can't be read: {error}; run again to resume") from error


def map_http_error(error: Any, profile: ProfileConfig, where: str) -> LikenessError:
    """Return our error for an HTTP status: what the operator should do."""
    status, reason = int(error.status_code), read_error(error.body or error.message)
    whole = f"{error} {error.body}".lower()  # the SDK keeps codes such as insufficient_quota out of its message
    is_quota = status == 429 and any(word in whole for word in QUOTA_WORDS)
    if status in (401, 403):
        return RequestRefused(explain_refused_key(profile, where, status=status, reason=reason), status=status)
    if status == 404:
        path = error.request.url.path
        if path.endswith(("/chat/completions", "/responses")):
            message = f"{where} does not serve {profile.model}: {reason}; `likeness doctor` lists what it serves"
        else:
            message = f"{where} does not know {path}: {reason}; check base_url and capabilities of the LLM profile"
        return RequestRefused(message, status=status)
    if is_quota or status == 402:
        return QuotaExceeded(
            f"the quota at {where} is used up: {reason}; replies are kept: pay, and run again to resume", status=status
        )
    if status == 429:
        wait = read_retry_after(error.response)
        asked = "asks to wait" if wait is None else f"asks to wait {wait:.0f} s"
        return EndpointUnavailable(
            f"{where} {asked} (rate limit): {reason}; run again later, or set requests_per_minute of the LLM profile",
            status=status, is_billable=False, retry_after=wait,
        )  # fmt: skip
    if status < 500 and status != 408:
        return RequestRefused(
            f"{where} refuses the request: {reason}; check the LLM profile with `likeness doctor`", status=status
        )
    return EndpointUnavailable(
        f"{where} answered {status}: {reason}; run again later to resume, or choose another LLM profile",
        status=status, retry_after=read_retry_after(error.response),
    )  # fmt: skip


def explain_refused_key(profile: ProfileConfig, where: str, *, status: int, reason: str) -> str:
    """Return what to do about status 401 or 403."""
    variable = profile.api_key_variable
    if variable is None:
        return f"{where} asks for a key ({status}): {reason}; set api_key_variable of the LLM profile"
    if status == 403:
        return f"{where} forbids the request (403): {reason}; check what the key in {variable} may do"
    return f"{where} refuses the key in {variable}: {reason}; export a valid one"


def read_retry_after(response: "httpx2.Response") -> float | None:
    """Return the seconds that a provider asks to wait; None where it names none that make sense."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None  # nan and negative numbers are no answer
