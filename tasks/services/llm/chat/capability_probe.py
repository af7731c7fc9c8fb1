"""Find out how a server takes a JSON schema: the best way whose reply fits, kept for later runs."""

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
    """What was found out about a server."""

    structure: Structure


def find_structure(
    profile: ProfileConfig, *, store: Store, call: Callable[[dict[str, object]], ChatCompletion]
) -> Structure:
    """Return the first structure of the ladder that works, from the store where it is known.

    Raises:
        ConfigError: none does.

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
    raise ConfigError(f"{profile.model} at {profile.base_url} gives no JSON by any way: {'; '.join(reasons)[:400]}")


def try_structure(
    profile: ProfileConfig, structure: Structure, *, call: Callable[[dict[str, object]], ChatCompletion]
) -> str:
    """Return why one way of asking doesn't work, or nothing."""
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
        if error.status in (401, 403, 404):
            raise
        return str(error)
    except EndpointUnavailable as error:
        # Some servers answer a schema that they don't know with status 500; a dead one ends the search.
        if error.status is None or error.status < 500:
            raise
        return str(error)
    except ReplyInvalid as error:
        return str(error)
    return ""
