"""The JSON body of a chat completion: its fields, its messages, and an upper estimate of its tokens."""

import base64
import io
import json
from collections.abc import Iterable
from typing import Any, Required, TypedDict, cast

from PIL import Image

from tasks.services.llm.config import ProfileConfig

CHARACTERS_PER_TOKEN = 3  # English has about 4, so estimates err upward
TOKENS_PER_REQUEST = 50  # roles and delimiters

Message = dict[str, object]
"""`role`, and `content`: text, or parts of the types `text` and `image_url`."""


class ChatBody(TypedDict, total=False):
    """A request to `/chat/completions`. A profile's routing may add fields that only its provider knows."""

    model: Required[str]
    messages: Required[list[Message]]
    max_completion_tokens: Required[int]
    response_format: dict[str, object]
    tools: list[dict[str, object]]
    tool_choice: str | dict[str, object]
    reasoning_effort: str
    reasoning: dict[str, object]
    stream: bool
    stream_options: dict[str, object]


def make_body(profile: ProfileConfig, messages: Iterable[Message]) -> ChatBody:
    """Return a body without a response format."""
    body = {
        "model": profile.model,
        "messages": list(messages),
        "max_completion_tokens": profile.max_output_tokens,
        **profile.routing(),
    }
    return cast(ChatBody, body)  # a TypedDict can't be built from fields that are known at run time only


def count_body_tokens(body: ChatBody, profile: ProfileConfig) -> tuple[int, int]:
    """Return an upper estimate of a body's input tokens, and the cap on its output tokens."""
    characters = sum(len(json.dumps(body[name])) for name in ("response_format", "tools") if name in body)
    pixels = 0
    for message in body["messages"]:
        # An assistant message of a tool round has calls instead of content.
        content = message.get("content") or json.dumps(message.get("tool_calls") or "")
        parts: list[Any] = content if isinstance(content, list) else [{"type": "text", "text": content}]
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
    # Rebuilt from raw pixels: `convert` keeps `info`, from which `save` would write ICC profile and comment again.
    clean = Image.frombytes("RGB", image.size, image.tobytes())
    buffer = io.BytesIO()
    clean.save(buffer, format="PNG" if max(clean.size) <= 128 else "JPEG", quality=92)
    kind = "png" if max(clean.size) <= 128 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
