"""Latent cache in the object store, shared by runs: content-addressed by its inputs, verified before use."""

import logging
from pathlib import Path

from tasks.errors import ServiceUnavailable
from tasks.services.store.base import Store
from tasks.stage.digests import digest_file
from tasks.stage.files import write_atomic
from tasks.training.process.worker_spec import TrainingSpec

log = logging.getLogger(__name__)
PREFIX = "latents"


def fetch_latents(store: Store, spec: TrainingSpec) -> int:
    """Download latents that an earlier run stored, with their digests; the worker verifies both.

    Returns:
        Of how many images the latents need not be encoded.

    """
    for path in spec.latents_paths():
        if is_valid(path):
            continue
        try:
            # The digest first: without it the latents, far larger, are not downloaded.
            note = store.find_bytes(f"{PREFIX}/{digest_path_of(path).name}")
            data = store.find_bytes(f"{PREFIX}/{path.name}") if note else None
        except ServiceUnavailable as error:
            # Not an error: the worker encodes what is missing.
            log.warning("cached latents can't be fetched and are encoded again: %s", error)
            break
        if note and data:
            write_atomic(path, data)
            write_atomic(digest_path_of(path), note)  # last: a file without digest counts as absent
    return sum(num_images for path, num_images in spec.latents_paths().items() if is_valid(path))


def store_latents(store: Store, spec: TrainingSpec) -> None:
    """Upload the latents that this run encoded, the digest last; replace a damaged object."""
    for path in spec.latents_paths():
        if not is_valid(path):
            continue
        name, note = f"{PREFIX}/{path.name}", f"{PREFIX}/{digest_path_of(path).name}"
        try:
            if store.compute_sha256(name) != digest_file(path):  # equal content is not uploaded again
                store.put_file(name, path)
            store.put_bytes(note, digest_path_of(path).read_bytes())
        except ServiceUnavailable as error:
            log.warning("latents can't be stored for other runs: %s", error)
            return


def is_valid(path: Path) -> bool:
    """Whether a local cache file matches its digest file."""
    note = digest_path_of(path)
    return path.is_file() and note.is_file() and format_checksum(path) == note.read_bytes()


def format_checksum(path: Path) -> bytes:
    """Return digest and name in the format of sha256sum. The name binds a file to its key: a swapped one fails."""
    return f"{digest_file(path)}  {path.name}\n".encode()


def digest_path_of(path: Path) -> Path:
    """Return the path of a cache file's digest file."""
    return path.with_suffix(".sha256")
