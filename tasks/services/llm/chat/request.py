"""One request as plain data, for synchronous calls and for the lines of a batch file."""

import base64
import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from PIL import Image
from pydantic import BaseModel

from tasks.services.llm.chat.json_schema import strict_schema
from tasks.services.llm.chat.response_format import ask_for, set_reasoning
from tasks.services.llm.config import ProfileConfig, Structure

CHARACTERS_PER_TOKEN = 3  # English has about 4, so estimates err upward
TOKENS_PER_REQUEST = 50  # roles and delimiters


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

    def plain_body(self, profile: ProfileConfig) -> dict[str, Any]:
        """Return the body of a chat completion without a response format."""
        content: list[dict[str, object]] = []
        for part in self.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                url = encode_image(part, max_side=profile.max_image_side)
                content.append({"type": "image_url", "image_url": {"url": url}})
        body: dict[str, Any] = {
            "model": profile.model,
            "messages": [{"role": "system", "content": self.system}, {"role": "user", "content": content}],
            "max_completion_tokens": profile.max_output_tokens,
            **profile.routing(),
        }
        return set_reasoning(body, profile, is_reasoning=self.is_reasoning)

    def body(self, profile: ProfileConfig, structure: Structure) -> dict[str, Any]:
        """Return the body of a chat completion."""
        return ask_for(self.plain_body(profile), self.reply, structure)

    def compute_key(self, profile: ProfileConfig) -> str:
        """Return a digest of everything that decides the reply; it is also the batch `custom_id`."""
        # The plain body, so that another response format (after a new probe) finds the same cached replies.
        whole = [profile.base_url, self.plain_body(profile), strict_schema(self.reply), self.repeat, *self.tools]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:40]


def count_body_tokens(body: dict[str, Any], profile: ProfileConfig) -> tuple[int, int]:
    """Return an upper estimate of a body's input tokens, and the cap on its output tokens."""
    characters, pixels = len(json.dumps(body.get("response_format") or body.get("tools") or "")), 0
    for message in body["messages"]:
        content = message.get("content") or json.dumps(message.get("tool_calls") or "")
        parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "text":
                characters += len(part["text"])
            else:
                pixels += count_pixels(part["image_url"]["url"])
    tokens = characters // CHARACTERS_PER_TOKEN + pixels // profile.capabilities.pixels_per_token + TOKENS_PER_REQUEST
    return tokens, int(body["max_completion_tokens"])


def count_pixels(url: str) -> int:
    """Return the pixels of an image in a data URL."""
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as opened:
        return opened.width * opened.height


def encode_image(data: bytes, *, max_side: int) -> str:
    """Return a data URL of the pixels alone, at most `max_side` pixels a side.

    EXIF data, GPS position and thumbnails of a photo are not sent to providers.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    clean = Image.frombytes("RGB", image.size, image.tobytes())
    buffer = io.BytesIO()
    clean.save(buffer, format="PNG" if max(clean.size) <= 128 else "JPEG", quality=92)
    kind = "png" if max(clean.size) <= 128 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
