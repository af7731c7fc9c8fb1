"""One request as plain data: what the sync client sends and what a batch file holds."""

import base64
import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image
from pydantic import BaseModel

from tasks.services.llm.config import ProfileConfig
from tasks.services.llm.schema import strict_schema


@dataclass(frozen=True)
class RequestSpec:
    """A question with pictures and the shape of its answer.

    `parts` alternate freely: text, and PNG or JPEG bytes.
    """

    system: str
    parts: tuple[str | bytes, ...]
    reply: type[BaseModel]

    def body(self, profile: ProfileConfig) -> dict[str, Any]:
        """Return the body of a chat completion."""
        content: list[dict[str, Any]] = []
        for part in self.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                url = encode_image(part, max_side=profile.max_image_side)
                content.append({"type": "image_url", "image_url": {"url": url}})
        name = self.reply.__name__
        return {
            "model": profile.model,
            "messages": [
                {"role": "system", "content": self.system},
                {"role": "user", "content": content},
            ],
            "max_completion_tokens": profile.max_output_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": name, "strict": True, "schema": strict_schema(self.reply)},
            },
        }

    def compute_key(self, profile: ProfileConfig) -> str:
        """Return a digest of everything that decides the answer; the batch `custom_id` too."""
        text = json.dumps([profile.base_url, self.body(profile)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:40]


def encode_image(data: bytes, *, max_side: int) -> str:
    """Return a data URL of the pixels alone: no metadata, at most `max_side` pixels a side."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    clean = Image.frombytes("RGB", image.size, image.tobytes())
    buffer = io.BytesIO()
    clean.save(buffer, format="PNG" if max(clean.size) <= 128 else "JPEG", quality=92)
    kind = "png" if max(clean.size) <= 128 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
