"""Probe which response format a server supports: the strictest whose reply fits, cached for later runs."""

import hashlib
import json
from collections.abc import Callable
from typing import Literal, cast

from pydantic import BaseModel

from tasks.errors import ConfigError, ReplyInvalid
from tasks.services.llm.chat.completion import ChatCompletion
from tasks.services.llm.chat.json_schema import parse_reply
from tasks.services.llm.chat.response_format import ask_for, read_content
from tasks.services.llm.config import STRUCTURES, ProfileConfig, Structure
from tasks.services.llm.errors import EndpointUnavailable, RequestRefused
from tasks.services.llm.reply_cache import Record, find_record, put_record
from tasks.services.store.base import Store


class Probe(BaseModel):
    """The reply that is asked for: only a server that minds the schema hits the enum."""

    color: Literal["vermilion", "chartreuse"]


class Probed(Record):
    """The probed response format of a model at an address."""

    structure: Structure


def find_structure(
    profile: ProfileConfig, *, store: Store, call: Callable[[dict[str, object]], ChatCompletion]
) -> Structure:
    """Return the strictest response format that works, cached per address and model.

    Raises:
        ConfigError: none works.

    """
    identity = json.dumps([profile.base_url, profile.model])
    key = f"llm/response_formats/{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    kept = find_record(store, Probed, key)
    if kept is not None:
        return kept.structure
    reasons = []
    for structure in STRUCTURES:
        reason = try_structure(profile, cast(Structure, structure), call=call)
        if not reason:
            put_record(store, Probed(key=key, structure=cast(Structure, structure)))
            return cast(Structure, structure)
        reasons.append(f"{structure}: {reason}")
    raise ConfigError(f"{profile.model} at {profile.base_url} supports no response format: {'; '.join(reasons)[:400]}")


def try_structure(
    profile: ProfileConfig, structure: Structure, *, call: Callable[[dict[str, object]], ChatCompletion]
) -> str:
    """Return why one response format doesn't work, or an empty string."""
    # Neither color is the natural answer to the question: only an enforced enum gives one of the two reliably.
    body = {
        "model": profile.model,
        "messages": [
            {"role": "system", "content": "You answer in JSON."},
            {"role": "user", "content": "Which of the two colors is red?"},
        ],
        "max_completion_tokens": profile.max_output_tokens,
        **profile.routing(),
    }
    try:
        completion = call(ask_for(body, Probe, structure))
        parse_reply(Probe, read_content(completion, structure), completion)
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
