"""Cached latents in the store, shared by runs: keyed by what they were made of, verified before use."""

import logging
from pathlib import Path

from tasks.errors import ServiceUnavailable
from tasks.services.store.base import Store
from tasks.stage.digests import digest_file
from tasks.stage.files import write_atomic
from tasks.training.process.worker_spec import TrainingSpec

log = logging.getLogger(__name__)
PREFIX = "latents"


def fetch_latents(store: Store, spec: TrainingSpec) -> None:
    """Copy latents that an earlier run stored, with their digests; the worker verifies them."""
    for path in spec.latents_paths():
        if is_whole(path):
            continue
        try:
            note = store.find_bytes(f"{PREFIX}/{note_of(path).name}")
            data = store.find_bytes(f"{PREFIX}/{path.name}") if note else None
        except ServiceUnavailable as error:
            log.warning("cached latents can't be fetched and are made anew: %s", error)
            return
        if note and data:
            write_atomic(path, data)
            write_atomic(note_of(path), note)


def keep_latents(store: Store, spec: TrainingSpec) -> None:
    """Store what this run encoded, its digest last; a damaged object is replaced."""
    for path in spec.latents_paths():
        if not is_whole(path):
            continue
        name, note = f"{PREFIX}/{path.name}", f"{PREFIX}/{note_of(path).name}"
        try:
            if store.compute_sha256(name) != digest_file(path):
                store.put_file(name, path)
            store.put_bytes(note, note_of(path).read_bytes())
        except ServiceUnavailable as error:
            log.warning("latents can't be stored for other runs: %s", error)
            return


def is_whole(path: Path) -> bool:
    """Whether a local cache file is what its digest says."""
    note = note_of(path)
    return path.is_file() and note.is_file() and make_note(path) == note.read_bytes()


def make_note(path: Path) -> bytes:
    """Return a file's digest and name, as sha256sum writes them: another run's latents don't pass for this one's."""
    return f"{digest_file(path)}  {path.name}\n".encode()


def note_of(path: Path) -> Path:
    """Return the file that holds a cache file's digest."""
    return path.with_suffix(".sha256")
