"""One request as plain data, for synchronous calls and for the lines of a batch file, and its answer."""

import hashlib
import json
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel

from tasks.services.llm.chat.body import ChatBody, Message, encode_image, make_body
from tasks.services.llm.chat.json_schema import strict_schema
from tasks.services.llm.chat.response_format import ask_for, set_reasoning
from tasks.services.llm.config import ProfileConfig, ResponseFormat

T = TypeVar("T", bound=BaseModel)
T_co = TypeVar("T_co", bound=BaseModel, covariant=True)


@dataclass(frozen=True)
class RequestSpec(Generic[T_co]):
    """A prompt with images and the type of its reply.

    `parts` are text, and PNG or JPEG bytes, in any order. `repeat` distinguishes deliberate repetitions of one
    request, which would otherwise share a cached reply.
    """

    system: str
    parts: tuple[str | bytes, ...]
    reply: type[T_co]
    is_reasoning: bool = False
    repeat: int = 0
    tools: tuple[str, ...] = ()
    """Names of the tools that may be called before the answer."""

    def plain_body(self, profile: ProfileConfig) -> ChatBody:
        """Return the body of a chat completion without a response format."""
        content: list[dict[str, object]] = []
        for part in self.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                url = encode_image(part, max_side=profile.max_image_side)
                content.append({"type": "image_url", "image_url": {"url": url}})
        messages: list[Message] = [{"role": "system", "content": self.system}, {"role": "user", "content": content}]
        body = make_body(profile, messages)
        return set_reasoning(body, profile, is_reasoning=self.is_reasoning)

    def body(self, profile: ProfileConfig, response_format: ResponseFormat) -> ChatBody:
        """Return the body of a chat completion."""
        return ask_for(self.plain_body(profile), self.reply, response_format)

    def compute_key(self, profile: ProfileConfig) -> str:
        """Return a digest of everything that decides the reply; it is also the batch `custom_id`."""
        # The plain body, so that another response format (after a new probe) finds the same cached replies.
        # The address is part of it: one model id may name different weights at different servers.
        whole = [profile.base_url, self.plain_body(profile), strict_schema(self.reply), self.repeat, *self.tools]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class Answer(Generic[T]):
    """A validated reply and its provenance."""

    reply: T
    profile: str
    served_model: str
    fallback_index: int = 0
    reason: str = ""
    """Why the previous profile of the chain was skipped."""
    reasoning: str = ""
    """The model's own reasoning, where its provider returns it."""
    citations: tuple[str, ...] = ()
    called: tuple[str, ...] = ()
    """Names of the tools that were called for it."""
