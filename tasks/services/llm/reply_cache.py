"""Replies, refusals and probed capabilities in the store: signed, bound to their key, quarantined when damaged."""

import logging
import time
from typing import TypeVar

from pydantic import BaseModel

from tasks.errors import ArtifactCorrupt, ReplyInvalid
from tasks.services.store.base import Store
from tasks.stage.digests import dump_signed, load_signed

log = logging.getLogger(__name__)
REFUSAL_DAYS = 1.0


class Record(BaseModel):
    """A record that holds its own key, so that a copy under another key is detected."""

    key: str


class CachedReply(Record):
    """A validated reply."""

    content: str
    served_model: str
    reasoning: str = ""
    citations: tuple[str, ...] = ()
    called: tuple[str, ...] = ()
    """Names of the tools that were called for it."""


class Refusal(Record):
    """Why a profile's reply was invalid; for REFUSAL_DAYS its fallback is used without asking it again."""

    reason: str
    at: float


R = TypeVar("R", bound=Record)


def put_record(store: Store, record: Record) -> None:
    """Store a record under its key."""
    store.put_bytes(record.key, dump_signed(record))


def find_record(store: Store, kind: type[R], key: str) -> R | None:
    """Return a verified record; a damaged one is quarantined and counts as absent."""
    data = store.find_bytes(key)
    if data is None:
        return None
    try:
        record = load_signed(kind, data)
        # The signature doesn't cover the object's name: a copied object must not answer another request.
        if record.key != key:
            raise ArtifactCorrupt(f"the record belongs to {record.key}")
    except ArtifactCorrupt as error:
        quarantine(store, key, data, error=error)
        return None
    return record


def quarantine(store: Store, key: str, data: bytes, *, error: ArtifactCorrupt) -> None:
    """Move a damaged object to `<key>.quarantined`."""
    log.warning("%s is damaged (%s); it is kept as %s.quarantined and recomputed", key, error, key)
    # A store can't rename. Copy before delete: a crash in between repeats the move instead of losing the object.
    store.put_bytes(f"{key}.quarantined", data)
    store.delete(key)


def check_refusal(store: Store, key: str) -> None:
    """Raise ReplyInvalid where this profile's reply was invalid within the last REFUSAL_DAYS."""
    refusal = find_record(store, Refusal, key)
    if refusal is not None and time.time() - refusal.at < REFUSAL_DAYS * 86_400:
        raise ReplyInvalid(refusal.reason)
