"""HTTP transport through the `openai` package: bounded reads, one deadline per call, errors mapped to ours."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from tasks.errors import ConfigError, LikenessError
from tasks.redaction import register_secret, show_value
from tasks.services.llm.chat.body import ChatBody
from tasks.services.llm.chat.completion import read_error
from tasks.services.llm.chat.streaming import StreamReader, TextCleaner
from tasks.services.llm.config import ProfileConfig
from tasks.services.llm.errors import EndpointUnavailable, QuotaExceeded, RequestRefused

if TYPE_CHECKING:
    import httpx2
    from openai import APIStatusError, OpenAI

MAX_BYTES = 16_000_000  # of one reply; bounds the memory that a hostile server can claim
# Words in a 429 that mean an exhausted balance rather than a rate limit: waiting would not help.
QUOTA_WORDS = ("insufficient_quota", "quota", "credit", "billing", "spending limit")


class ByteStream(Protocol):
    """A response whose body is read piece by piece."""

    def iter_bytes(self) -> Iterator[bytes]:
        """Yield the body's pieces."""


def make_client(profile: ProfileConfig, *, start_local: Callable[[], str] | None) -> "OpenAI":
    """Return an OpenAI client. Raises ConfigError where the key is not in the environment."""
    import openai

    base_url = profile.base_url
    if base_url is None:
        if start_local is None:
            raise ConfigError("this profile needs the mini vision server, which is not running here")
        base_url = start_local()
    # Retries belong to one layer, llm/retries.py: the SDK would silently post a batch job twice.
    return openai.OpenAI(base_url=base_url, api_key=read_key(profile), max_retries=0)


def read_key(profile: ProfileConfig) -> str:
    """Return the profile's key and register it for redaction. Raises ConfigError where it is not set."""
    if not profile.api_key_variable:
        return "local"  # the SDK insists on a key
    key = os.environ.get(profile.api_key_variable, "")
    if not key:
        raise ConfigError(f"{profile.api_key_variable} is not set; export it, or use llm=local with the drawn world")
    return register_secret(key)


def complete(client: "OpenAI", body: ChatBody, *, timeout_seconds: float) -> dict[str, object]:
    """Return the JSON object of a chat completion, within a total time."""
    deadline = time.monotonic() + timeout_seconds
    # The raw body, so that its size and time are bounded before anything is parsed.
    create = client.chat.completions.with_streaming_response.create
    with create(**openai_arguments(body), timeout=timeout_seconds) as response:
        return read_object(response, deadline=deadline, seconds=timeout_seconds)


def read_object(response: "ByteStream", *, deadline: float, seconds: float) -> dict[str, object]:
    """Return a response's JSON object. Raises EndpointUnavailable for anything else.

    The SDK's timeout bounds the gap between two reads, so a server that trickles bytes would never exceed it.
    """
    data = bytearray()
    for chunk in response.iter_bytes():
        data += chunk
        if time.monotonic() > deadline:
            raise EndpointUnavailable(f"the response was incomplete after {seconds:.0f} s; run again to resume")
        if len(data) > MAX_BYTES:
            raise EndpointUnavailable(f"the response is longer than {MAX_BYTES / 1e6:.0f} MB; run again to resume")
    value = parse_body(bytes(data))
    if not isinstance(value, dict):
        raise EndpointUnavailable(f"the response is not a JSON object: {show_value(bytes(data[:60]))}; run again")
    return value


def parse_body(data: bytes) -> object:
    """Return parsed JSON. Raises EndpointUnavailable for anything else, deep nesting included."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EndpointUnavailable(f"the response is not JSON: {show_value(data[:60])}; run again to resume") from error


def complete_streaming(
    client: "OpenAI", body: ChatBody, *, timeout_seconds: float, on_text: Callable[[str], None]
) -> dict[str, object]:
    """Stream a reply to `on_text` and return the whole completion, as `complete` would.

    An interrupt closes the connection, upon which providers stop generating.
    """
    deadline = time.monotonic() + timeout_seconds
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    cleaner = TextCleaner(on_text)
    reader = StreamReader(cleaner.feed)
    create = client.chat.completions.with_streaming_response.create
    size, pending = 0, b""
    with create(**openai_arguments(body), timeout=timeout_seconds) as response:
        # Bytes, not the SDK's lines: those are buffered without limit until a line ends.
        for chunk in response.iter_bytes():
            size += len(chunk)
            if time.monotonic() > deadline:
                raise EndpointUnavailable(f"the response was incomplete after {timeout_seconds:.0f} s; ask again")
            if size > MAX_BYTES:
                raise EndpointUnavailable(f"the response is longer than {MAX_BYTES / 1e6:.0f} MB; ask again")
            # Split before decoding: a chunk may end within a UTF-8 sequence.
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                reader.feed(line.decode("utf-8", "replace").rstrip("\r"))
        reader.feed(pending.decode("utf-8", "replace"))
    whole = reader.finish()
    cleaner.flush()
    return whole


# Named arguments of the SDK's `create`; any other field of a body goes through `extra_body`.
KNOWN_ARGUMENTS = frozenset(
    {"model", "messages", "max_completion_tokens", "response_format", "tools", "tool_choice", "reasoning_effort",
     "stream", "stream_options", "temperature", "seed"}
)  # fmt: skip


def openai_arguments(body: ChatBody) -> dict[str, Any]:
    """Return a request body as keyword arguments of the SDK's `create`."""
    known = {key: value for key, value in body.items() if key in KNOWN_ARGUMENTS}
    others = {key: value for key, value in body.items() if key not in KNOWN_ARGUMENTS}
    return {**known, **({"extra_body": others} if others else {})}


@contextmanager
def translated(profile: ProfileConfig) -> Iterator[None]:
    """Map the SDK's errors to ours, with whether the attempt may be billed."""
    import httpx2
    import openai

    where = profile.base_url or "the mini vision server"
    try:
        yield
    except httpx2.HTTPError as error:  # while the body is read; before that the SDK has errors of its own
        raise EndpointUnavailable(f"{where} sent an incomplete response: {error}; run again to resume") from error
    except openai.APIConnectionError as error:
        # Only an attempt that failed before the request was sent is certainly free.
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


def map_http_error(error: "APIStatusError", profile: ProfileConfig, where: str) -> LikenessError:
    """Return our error for an HTTP status; its message says what the operator should do."""
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
    if is_quota or status == 402:  # 402: OpenRouter's status for an exhausted balance
        return QuotaExceeded(
            f"the quota at {where} is used up: {reason}; replies are cached: pay, and run again to resume",
            status=status,
        )
    # A rate-limited request was not run, so it is free. A 5xx may come from a gateway after the model has generated.
    if status == 429:
        wait = read_retry_after(error.response)
        asked = "asks to wait" if wait is None else f"asks to wait {wait:.0f} s"
        return EndpointUnavailable(
            f"{where} {asked} (rate limit): {reason}; run again later, or set requests_per_minute of the LLM profile",
            status=status, is_billable=False, retry_after=wait,
        )  # fmt: skip
    if status < 500 and status != 408:  # 408 is a timeout, worth a retry like 5xx
        return RequestRefused(
            f"{where} refuses the request: {reason}; check the LLM profile with `likeness doctor`", status=status
        )
    return EndpointUnavailable(
        f"{where} answered {status}: {reason}; run again later to resume, or choose another LLM profile",
        status=status, retry_after=read_retry_after(error.response),
    )  # fmt: skip


def explain_refused_key(profile: ProfileConfig, where: str, *, status: int, reason: str) -> str:
    """Return the message for status 401 or 403."""
    variable = profile.api_key_variable
    if variable is None:
        return f"{where} asks for a key ({status}): {reason}; set api_key_variable of the LLM profile"
    if status == 403:
        return f"{where} forbids the request (403): {reason}; check what the key in {variable} may do"
    return f"{where} refuses the key in {variable}: {reason}; export a valid one"


def read_retry_after(response: "httpx2.Response") -> float | None:
    """Return Retry-After in seconds; None where it is absent, an HTTP date, negative or not finite."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None  # the comparison is false for nan too
