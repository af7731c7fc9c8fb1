"""Send images as presigned URLs of our own bucket instead of inline; opt-in, since anybody with a URL can read it."""

import base64
import hashlib
import json

from tasks.services.llm.chat.body import ChatBody, Message
from tasks.services.store.base import Store

CALL_SECONDS = 3600  # retries of a call reuse its URLs
# SigV4 caps a presigned URL at seven days.
BATCH_SECONDS = 3 * 86_400  # providers fetch images up to the end of a job's 24 h window; the rest is margin


def presign_images(body: ChatBody, store: Store, *, seconds: int) -> ChatBody:
    """Return a body whose data URLs are replaced by presigned URLs, valid for `seconds`.

    Raises:
        ConfigError: the store can't presign URLs.

    """
    messages: list[Message] = []
    for message in body["messages"]:
        content = message.get("content")
        if isinstance(content, list):
            content = [presign_part(part, store, seconds) for part in content]
        messages.append({**message, "content": content})
    return {**body, "messages": messages}


def presign_part(part: Message, store: Store, seconds: int) -> Message:
    """Return a part of a message with its inline image replaced by a URL."""
    image_url = part.get("image_url")
    url = image_url["url"] if isinstance(image_url, dict) else ""
    if not url.startswith("data:"):
        return part
    head, _, payload = url.partition(",")
    data, kind = base64.b64decode(payload), head.removeprefix("data:image/").partition(";")[0]
    key = f"llm/pictures/{hashlib.sha256(data).hexdigest()[:40]}.{kind}"
    store.put_if_absent(key, data)  # content-addressed: an existing object is this image
    return {**part, "image_url": {"url": store.presign(key, seconds=seconds)}}


def presign_line(line: bytes, store: Store) -> bytes:
    """Return a batch file's line with its inline images replaced by URLs."""
    row = json.loads(line)
    body = presign_images(row["body"], store, seconds=BATCH_SECONDS)
    return json.dumps({**row, "body": body}, sort_keys=True).encode() + b"\n"
