"""Probe which response format a server supports: the strictest whose reply fits, cached for later runs."""

import hashlib
import json
from collections.abc import Callable
from typing import Literal, cast

from pydantic import BaseModel

from tasks.errors import ConfigError, ReplyInvalid
from tasks.services.llm.chat.body import ChatBody, Message, make_body
from tasks.services.llm.chat.completion import ChatCompletion
from tasks.services.llm.chat.json_schema import parse_reply
from tasks.services.llm.chat.response_format import ask_for, read_content
from tasks.services.llm.config import RESPONSE_FORMATS, ProfileConfig, ResponseFormat
from tasks.services.llm.errors import EndpointUnavailable, RequestRefused
from tasks.services.llm.reply_cache import Record, find_record, put_record
from tasks.services.store.base import Store


class Probe(BaseModel):
    """The requested reply: only a server that enforces the schema returns a value of the enum."""

    color: Literal["vermilion", "chartreuse"]


class Probed(Record):
    """The probed response format of a model at an address."""

    response_format: ResponseFormat


def probe_response_format(
    profile: ProfileConfig, *, store: Store, call: Callable[[ChatBody], ChatCompletion]
) -> ResponseFormat:
    """Return the strictest response format that works, cached per address and model.

    Raises:
        ConfigError: none works.

    """
    identity = json.dumps([profile.base_url, profile.model])
    key = f"llm/response_formats/{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    kept = find_record(store, Probed, key)
    if kept is not None:
        return kept.response_format
    reasons = []
    for response_format in RESPONSE_FORMATS:
        reason = try_response_format(profile, cast(ResponseFormat, response_format), call=call)
        if not reason:
            put_record(store, Probed(key=key, response_format=cast(ResponseFormat, response_format)))
            return cast(ResponseFormat, response_format)
        reasons.append(f"{response_format}: {reason}")
    raise ConfigError(f"{profile.model} at {profile.base_url} supports no response format: {'; '.join(reasons)[:400]}")


def try_response_format(
    profile: ProfileConfig, response_format: ResponseFormat, *, call: Callable[[ChatBody], ChatCompletion]
) -> str:
    """Return why one response format doesn't work, or an empty string."""
    # Neither color is the natural answer to the question: only an enforced enum gives one of the two reliably.
    messages: list[Message] = [
        {"role": "system", "content": "You answer in JSON."},
        {"role": "user", "content": "Which of the two colors is red?"},
    ]
    try:
        completion = call(ask_for(make_body(profile, messages), Probe, response_format))
        parse_reply(Probe, read_content(completion, response_format), completion)
    except RequestRefused as error:
        if error.status in (401, 403, 404):  # key, address or model: no other format would help
            raise
        return str(error)
    except EndpointUnavailable as error:
        # Some servers answer an unsupported schema with status 500; one that does not answer ends the probe.
        if error.status is None or error.status < 500:
            raise
        return str(error)
    except ReplyInvalid as error:
        return str(error)
    return ""
