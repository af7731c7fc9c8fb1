"""The stage contract: keys by content, objects first, manifest last, digests verified on reading.

A stage's folder is `<prefix>/<stage_key>/` in the store, for example `02-prior/1f3a.../`. A folder without a manifest
is incomplete, so a crash at any point leaves either a complete stage or one that is computed again.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

from pydantic import BaseModel

from tasks.errors import ArtifactCorrupt
from tasks.manifests.base import Manifest, ObjectRef
from tasks.services.store.base import Store
from tasks.services.store.lease import HeldLease
from tasks.stage.digests import digest, digest_file, dump_signed, load_signed

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Manifest)

PREFIXES = {
    "subject": "01-subject",
    "prior": "02-prior",
    "training": "03-training",
    "evaluation": "04-evaluation",
    "scoring": "05-scoring",
    "publishing": "06-publishing",
}
MANIFEST_NAME = "manifest.json"
VERIFIED_AT_ONCE = 16


@dataclass(frozen=True)
class Stage(Generic[M]):
    """A stage with its inputs: everything that determines its output and cache key."""

    name: str
    manifest: type[M]
    """Its schema is part of the key: a new field is another key."""
    version: int
    """STAGE_VERSION, incremented by hand."""
    settings: object
    """JSON values: configuration fields that change the result, versions of shared code, and nothing else."""
    inputs: tuple[str, ...]
    """Content digests of everything it reads."""

    @cached_property
    def key(self) -> str:
        """The key of its output."""
        schema = compute_schema_digest(self.manifest)
        return digest([self.name, self.version, schema, self.settings, list(self.inputs)])[:32]


class ManifestHead(TypedDict):
    """The fields that every manifest has in common."""

    stage: str
    stage_key: str
    stage_version: int
    seconds: float
    cost_usd: float | None
    counts: dict[str, int]
    objects: tuple[ObjectRef, ...]


def compute_schema_digest(kind: type[BaseModel]) -> str:
    """Return the digest of a model's schema; editing a docstring or description does not change it."""
    return digest(without_documentation(kind.model_json_schema()))


def without_documentation(node: Any) -> Any:
    """Return a JSON schema without titles and descriptions."""
    # Keys below `properties` and `$defs` are names, of which one may be `title` or `description`.
    if isinstance(node, list):
        return [without_documentation(child) for child in node]
    if not isinstance(node, dict):
        return node
    return {
        name: {key: without_documentation(child) for key, child in value.items()}
        if name in ("properties", "$defs")
        else without_documentation(value)
        for name, value in node.items()
        if name not in ("title", "description")
    }


class StageFolder:
    """One stage's folder in the store while it is being filled.

    Writes are refused with LeaseLost once another process may be filling it: `lease` is the fence.
    """

    def __init__(self, store: Store, stage: str, stage_key: str, *, lease: HeldLease | None = None) -> None:
        self.store = store
        self.lease = lease
        self.stage = stage
        self.stage_key = stage_key
        self.prefix = f"{PREFIXES[stage]}/{stage_key}"
        self.started = time.monotonic()
        self.refs: dict[str, ObjectRef] = {}

    def check_lease(self, *, is_final: bool = False) -> None:
        """Raise LeaseLost where another process may be filling this folder."""
        if self.lease is not None:
            self.lease.check(is_final=is_final)

    def put(self, name: str, data: bytes) -> ObjectRef:
        """Store one object of this stage; `finish` lists it in the manifest."""
        self.check_lease()
        key = f"{self.prefix}/{name}"
        self.store.put_bytes(key, data)
        ref = ObjectRef(key=key, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        self.store.keep(ref.sha256, data)
        self.refs[key] = ref
        return ref

    def put_file(self, name: str, path: Path) -> ObjectRef:
        """Store one file of this stage."""
        self.check_lease()
        key = f"{self.prefix}/{name}"
        self.store.put_file(key, path)
        ref = ObjectRef(key=key, sha256=digest_file(path), size_bytes=path.stat().st_size)
        self.store.keep(ref.sha256, path)
        self.refs[key] = ref
        return ref

    def keep(self, ref: ObjectRef) -> ObjectRef:
        """List an object in the manifest that an earlier attempt stored in this folder."""
        self.refs[ref.key] = ref
        return ref

    def reuse(self, name: str) -> ObjectRef | None:
        """Return an object that an earlier attempt stored with `put_resumable`, if it verifies.

        The note `<name>.ref` is written after the object, so an incomplete object has none.
        """
        note = self.store.find_bytes(f"{self.prefix}/{name}.ref")
        if note is None:
            return None
        try:
            ref = load_signed(ObjectRef, note)
            verify(self.store, ref)
        except ArtifactCorrupt:
            return None
        if ref.key != f"{self.prefix}/{name}":  # a valid note, copied from another object
            return None
        return self.keep(ref)

    def put_resumable(self, name: str, data: bytes) -> ObjectRef:
        """Store an object and a note of its digest, so that a later attempt of this stage can reuse it."""
        ref = self.put(name, data)
        self.store.put_bytes(f"{self.prefix}/{name}.ref", dump_signed(ref))  # after the object, see `reuse`
        return ref

    def discard(self, ref: ObjectRef) -> None:
        """Remove an object of this stage, which no manifest may list any more."""
        self.check_lease()
        self.store.delete(f"{ref.key}.ref")  # first: a note without its object would be taken for a damaged one
        self.store.delete(ref.key)
        self.refs.pop(ref.key, None)

    def head(self, version: int, *, counts: dict[str, int], cost_usd: float | None = 0.0) -> ManifestHead:
        """Return the first fields of the manifest; `finish` fills in time and objects."""
        return {
            "stage": self.stage,
            "stage_key": self.stage_key,
            "stage_version": version,
            "seconds": 0.0,
            "cost_usd": cost_usd,
            "counts": counts,
            "objects": (),
        }

    def finish(self, manifest: M) -> M:
        """Write the manifest, with duration and all objects; this last write makes the stage complete."""
        finished = manifest.model_copy(
            update={
                "seconds": round(time.monotonic() - self.started, 3),
                # Sorted: their order is part of the content digest.
                "objects": tuple(self.refs[key] for key in sorted(self.refs)),
            }
        )
        self.check_lease(is_final=True)
        key, data = f"{self.prefix}/{MANIFEST_NAME}", dump_signed(finished, indent=1)
        if not self.store.put_if_absent(key, data):
            # Either it is written again, for a lost effect outside the store, or this process was suspended since the
            # check and another one has taken its lease and finished.
            self.check_lease(is_final=True)
            self.store.put_bytes(key, data)
        return finished


def find_manifest(store: Store, kind: type[M], *, stage: str, key: str) -> M | None:
    """Return the stored manifest if it and every object it names verify.

    A folder that does not verify is quarantined: its manifest is moved aside with the reason,
    so that the stage is computed again.
    """
    name = f"{PREFIXES[stage]}/{key}/{MANIFEST_NAME}"
    data = store.find_bytes(name)
    if data is None:
        return None
    try:
        manifest = load_signed(kind, data)
        check_manifest(manifest, stage, key)
        verify_all(store, manifest.objects)
    except ArtifactCorrupt as error:
        log.warning("%s %s is damaged and will be computed again: %s", stage, key[:8], error)
        # Copied before it is deleted: a crash in between finds the damaged manifest again.
        store.put_bytes(f"{name}.quarantined", data)
        store.delete(name)
        return None
    return manifest


def check_manifest(manifest: Manifest, stage: str, stage_key: str) -> None:
    """Raise ArtifactCorrupt for a manifest of another stage, or one that refers to objects it doesn't list."""
    if (manifest.stage, manifest.stage_key) != (stage, stage_key):
        raise ArtifactCorrupt(f"the manifest is that of {manifest.stage} {manifest.stage_key[:8]}")
    prefix = f"{PREFIXES[stage]}/{stage_key}/"
    listed = {ref.key: ref for ref in manifest.objects}
    # Otherwise a manifest could pass off another stage's objects as its own.
    if any(not key.startswith(prefix) for key in listed):
        raise ArtifactCorrupt("the manifest lists objects of another folder")
    # Only listed objects are verified. References into other folders are covered by those stages' manifests.
    for ref in iter_refs(manifest):
        if ref.key.startswith(prefix) and listed.get(ref.key) != ref:
            raise ArtifactCorrupt(f"the manifest uses {ref.key}, which it doesn't list")


def iter_refs(value: Any) -> Iterator[ObjectRef]:
    """Yield every object reference in a record, at any depth."""
    if isinstance(value, ObjectRef):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from iter_refs(getattr(value, name))
    elif isinstance(value, dict):
        for child in value.values():
            yield from iter_refs(child)
    elif isinstance(value, tuple | list):
        for child in value:
            yield from iter_refs(child)


def verify_all(store: Store, refs: Sequence[ObjectRef]) -> None:
    """Verify objects concurrently, since each is a request to a bucket. Raises ArtifactCorrupt."""
    with ThreadPoolExecutor(VERIFIED_AT_ONCE) as pool:
        # Iterating raises the first error; leaving the pool waits for the requests in flight.
        for _ in pool.map(lambda ref: verify(store, ref), refs):
            pass


def verify(store: Store, ref: ObjectRef) -> None:
    """Check an object's digest. Raises ArtifactCorrupt."""
    actual = store.compute_sha256(ref.key)
    if actual != ref.sha256:
        state = "is missing" if actual is None else "has changed"
        raise ArtifactCorrupt(f"{ref.key} {state}; run again to rebuild it")


def read_verified(store: Store, ref: ObjectRef) -> bytes:
    """Return an object's bytes. Raises ArtifactCorrupt if they don't have the digest of the reference."""
    data = store.find_bytes(ref.key, sha256=ref.sha256)
    if data is None or hashlib.sha256(data).hexdigest() != ref.sha256:
        state = "is missing" if data is None else "has changed"
        raise ArtifactCorrupt(f"{ref.key} {state}; run again to rebuild it")
    return data


def store_reasoning(folder: StageFolder, reasoning: dict[str, str]) -> ObjectRef | None:
    """Store the models' reasoning by item; return None where no provider returned any."""
    given = {name: text for name, text in reasoning.items() if text}
    return folder.put("reasoning.json", json.dumps(given, indent=1).encode()) if given else None


def fetch_folder(store: Store, refs: Iterable[ObjectRef], *, below: str, folder: Path) -> Path:
    """Copy objects to a local folder, under the part of their keys after `/<below>/`; verify each."""
    for ref in refs:
        # `<prefix>/<stage key>/<below>/<path>` -> `<path>`
        path = folder / ref.key.split(f"/{below}/", 1)[1]
        # A retry after a failure keeps the files that arrived whole.
        if path.exists() and digest_file(path) == ref.sha256:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        store.get_file(ref.key, path, sha256=ref.sha256)
        if digest_file(path) != ref.sha256:
            path.unlink()  # may be a hard link to the damaged object; only this name goes
            raise ArtifactCorrupt(f"{ref.key} has changed; run again to rebuild it")
    return folder
