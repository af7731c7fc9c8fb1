"""Show pictures by address instead of inside the request: presigned, of our own bucket, by explicit choice."""

import base64
import hashlib
import json
from typing import Any

from tasks.services.store.base import Store

CALL_SECONDS = 3600
BATCH_SECONDS = 3 * 86_400  # a batch job may begin a day late, and is looked at once more after a failure


def publish_pictures(body: dict[str, Any], store: Store, *, seconds: int) -> dict[str, Any]:
    """Return a body whose data URLs are addresses in the store that work for a while.

    Raises:
        ConfigError: the store can't sign addresses.

    """
    messages = []
    for message in body["messages"]:
        content = message.get("content")
        if isinstance(content, list):
            content = [publish_part(part, store, seconds) for part in content]
        messages.append({**message, "content": content})
    return {**body, "messages": messages}


def publish_part(part: dict[str, Any], store: Store, seconds: int) -> dict[str, object]:
    """Return a part of a message with its picture in the store."""
    url = part.get("image_url", {}).get("url", "")
    if not url.startswith("data:"):
        return part
    head, _, payload = url.partition(",")
    data, kind = base64.b64decode(payload), head.removeprefix("data:image/").partition(";")[0]
    key = f"llm/pictures/{hashlib.sha256(data).hexdigest()[:40]}.{kind}"
    store.put_new(key, data)
    return {**part, "image_url": {"url": store.presign(key, seconds=seconds)}}


def publish_line(line: bytes, store: Store) -> bytes:
    """Return a batch file's line with its pictures in the store."""
    row = json.loads(line)
    body = publish_pictures(row["body"], store, seconds=BATCH_SECONDS)
    return json.dumps({**row, "body": body}, sort_keys=True).encode() + b"\n"
