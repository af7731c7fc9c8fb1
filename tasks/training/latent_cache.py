"""Cached latents in the store, shared by runs: keyed by what they were made of, verified before use."""

import hashlib
import json

from tasks.contract import digest_file
from tasks.services.store import Store
from tasks.training.spec import TrainingSpec

PREFIX = "latents"


def fetch_latents(store: Store, spec: TrainingSpec) -> None:
    """Copy latents that an earlier run stored; a damaged object is left out, and made anew."""
    for kind in ("instance", "class"):
        path = spec.latents_path(kind)
        note = store.find_bytes(f"{PREFIX}/{path.stem}.json")
        data = store.find_bytes(f"{PREFIX}/{path.name}") if note else None
        if note is None or data is None or path.exists():
            continue
        if hashlib.sha256(data).hexdigest() == json.loads(note)["sha256"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def keep_latents(store: Store, spec: TrainingSpec) -> None:
    """Store what this run encoded, its digest last."""
    for kind in ("instance", "class"):
        path = spec.latents_path(kind)
        note = f"{PREFIX}/{path.stem}.json"
        if path.exists() and store.find_bytes(note) is None:
            store.put_file(f"{PREFIX}/{path.name}", path)
            store.put_bytes(note, json.dumps({"sha256": digest_file(path)}).encode())
