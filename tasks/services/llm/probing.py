"""Find out how a server takes a JSON schema: the best way whose reply fits, kept for later runs."""

import hashlib
import json
from collections.abc import Callable
from typing import Any, Literal, cast

from pydantic import BaseModel

from tasks.errors import ConfigError, ReplyInvalid, ServiceUnavailable
from tasks.services.llm.config import STRUCTURES, ProfileConfig, Structure
from tasks.services.llm.dialects import ask_for, read_content
from tasks.services.llm.schema import parse_reply
from tasks.services.store import Store


class Probe(BaseModel):
    """The reply that is asked for: only a server that minds the schema hits the enum."""

    color: Literal["vermilion", "chartreuse"]


def find_structure(
    profile: ProfileConfig, *, store: Store, call: Callable[[dict[str, Any]], dict[str, Any]]
) -> Structure:
    """Return the first structure of the ladder that works, from the store where it is known.

    Raises:
        ConfigError: none does.

    """
    identity = json.dumps([profile.base_url, profile.model])
    key = f"llm/dialects/{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    kept = store.find_bytes(key)
    if kept is not None and kept.decode() in STRUCTURES:
        return cast(Structure, kept.decode())
    reasons = []
    for structure in STRUCTURES:
        reason = try_structure(profile, cast(Structure, structure), call=call)
        if not reason:
            store.put_bytes(key, structure.encode())
            return cast(Structure, structure)
        reasons.append(f"{structure}: {reason}")
    raise ConfigError(f"{profile.model} at {profile.base_url} gives no JSON by any way: {'; '.join(reasons)[:400]}")


def try_structure(
    profile: ProfileConfig, structure: Structure, *, call: Callable[[dict[str, Any]], dict[str, Any]]
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
        choices = completion.get("choices") or [{}]
        message = choices[0].get("message") or {}
        content = read_content(message, structure)
        parse_reply(Probe, content, finish_reason=choices[0].get("finish_reason"), refusal=message.get("refusal"))
    except ConfigError as error:
        if "refuses the request" not in str(error):
            raise
        return str(error)
    except ServiceUnavailable as error:
        # Some servers answer a schema that they don't know with status 500; a dead one ends the search.
        if "answered 5" not in str(error):
            raise
        return str(error)
    except ReplyInvalid as error:
        return str(error)
    return ""
