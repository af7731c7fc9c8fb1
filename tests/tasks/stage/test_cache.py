"""Stage keys, manifests, digests."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ArtifactCorrupt
from tasks.manifests.base import Manifest, ObjectRef
from tasks.services.config import StoreConfig
from tasks.services.store import local as store_module
from tasks.services.store.base import Store
from tasks.services.store.local import LocalStore
from tasks.services.store.s3 import S3Store
from tasks.stage.cache import (
    MANIFEST_NAME,
    PREFIXES,
    Stage,
    StageFolder,
    compute_schema_digest,
    find_manifest,
    read_verified,
    verify,
)
from tasks.stage.digests import DIGEST_FIELD, sign


class Fuller(Manifest):
    """A manifest with one field more."""

    more: str


class Documented(Manifest):
    """The same manifest in other words."""


def finish(folder: StageFolder) -> Manifest:
    return folder.finish(Manifest(**folder.head(1, counts={"things": 1})))


def test_stage_key_depends_on_every_input() -> None:
    base = Stage("prior", Manifest, 1, settings={"steps": 3}, inputs=("a",)).key
    others = [
        Stage("subject", Manifest, 1, settings={"steps": 3}, inputs=("a",)).key,
        Stage("prior", Manifest, 2, settings={"steps": 3}, inputs=("a",)).key,
        Stage("prior", Manifest, 1, settings={"steps": 4}, inputs=("a",)).key,
        Stage("prior", Manifest, 1, settings={"steps": 3}, inputs=("b",)).key,
    ]
    others.append(Stage("prior", Fuller, 1, settings={"steps": 3}, inputs=("a",)).key)
    assert len({base, *others}) == 6
    assert base == Stage("prior", Manifest, 1, settings={"steps": 3}, inputs=("a",)).key


def test_a_finished_stage_is_a_cache_hit(any_store: Store) -> None:
    folder = StageFolder(any_store, "prior", "k1")
    folder.put("images/0.png", b"pixels")
    assert find_manifest(any_store, Manifest, stage="prior", key="k1") is None
    manifest = finish(folder)
    assert find_manifest(any_store, Manifest, stage="prior", key="k1") == manifest


@pytest.mark.parametrize("damage", [b"pixelz", None])
def test_a_damaged_object_invalidates_the_cached_stage(any_store: Store, damage: bytes | None) -> None:
    folder = StageFolder(any_store, "prior", "k1")
    ref = folder.put("images/0.png", b"pixels")
    finish(folder)
    any_store.delete(ref.key)
    if damage is not None:
        any_store.put_bytes(ref.key, damage)
    assert find_manifest(any_store, Manifest, stage="prior", key="k1") is None
    assert any_store.find_bytes(f"{PREFIXES['prior']}/k1/{MANIFEST_NAME}.quarantined") is not None


def test_a_truncated_manifest_is_not_trusted(store: Store) -> None:
    folder = StageFolder(store, "prior", "k1")
    finish(folder)
    key = f"{folder.prefix}/{MANIFEST_NAME}"
    store.put_bytes(key, (store.find_bytes(key) or b"")[:-20])
    assert find_manifest(store, Manifest, stage="prior", key="k1") is None


def test_an_object_of_an_earlier_attempt_is_reused_only_if_intact(store: Store) -> None:
    first = StageFolder(store, "prior", "k1")
    ref = first.put_resumable("a.png", b"whole")
    again = StageFolder(store, "prior", "k1")
    assert again.reuse("a.png") == ref
    store.put_bytes(ref.key, b"torn")
    assert StageFolder(store, "prior", "k1").reuse("a.png") is None
    first.put("b.png", b"written but never noted")
    assert StageFolder(store, "prior", "k1").reuse("b.png") is None


def test_reading_checks_the_digest(store: Store) -> None:
    ref = StageFolder(store, "prior", "k1").put("a", b"right")
    store.put_bytes(ref.key, b"wrong")
    with pytest.raises(ArtifactCorrupt, match="02-prior/k1/a has changed"):
        read_verified(store, ref)


def test_docstrings_do_not_change_the_schema_digest() -> None:
    assert compute_schema_digest(Documented) == compute_schema_digest(Manifest)
    assert compute_schema_digest(Fuller) != compute_schema_digest(Manifest)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_any_damaged_byte_quarantines_the_manifest(store: Store, damage: str) -> None:
    folder = StageFolder(store, "prior", "k1")
    folder.put("images/0.png", b"pixels")
    finish(folder)
    key = f"{folder.prefix}/{MANIFEST_NAME}"
    whole = store.find_bytes(key) or b""
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        store.put_bytes(key, bytes(flipped) if damage == "flip" else whole[:place])
        assert find_manifest(store, Manifest, stage="prior", key="k1") is None
        assert store.find_bytes(key) is None
        assert store.find_bytes(f"{key}.quarantined") is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("objects", []),
        ("seconds", 1e9),
        ("objects", [{"key": "../../etc/passwd", "sha256": "0" * 64, "size_bytes": 1}]),
        ("objects", [{"key": "/etc/passwd", "sha256": "0" * 64, "size_bytes": 1}]),
        ("stage_key", "k2"),
    ],
)
@pytest.mark.parametrize("is_signed", [False, True])
def test_an_edited_manifest_is_quarantined_once_and_the_stage_is_recomputed(
    store: Store, field: str, value: object, is_signed: bool
) -> None:
    folder = StageFolder(store, "prior", "k1")
    ref = folder.put("images/0.png", b"pixels")
    folder.finish(WithImage(**folder.head(1, counts={}), image=ref))
    key = f"{folder.prefix}/{MANIFEST_NAME}"
    plain = json.loads(store.find_bytes(key) or b"")
    plain[field] = value
    if is_signed:  # whoever writes the store can sign too
        plain.pop(DIGEST_FIELD)
        plain = sign(plain)
    store.put_bytes(key, json.dumps(plain).encode())
    is_harmless = is_signed and field == "seconds"
    assert (find_manifest(store, WithImage, stage="prior", key="k1") is not None) is is_harmless
    again = StageFolder(store, "prior", "k1")
    again.finish(WithImage(**again.head(1, counts={}), image=again.put("images/0.png", b"pixels")))
    assert find_manifest(store, WithImage, stage="prior", key="k1") is not None


class WithImage(Manifest):
    """A manifest that uses an object."""

    image: ObjectRef


def test_the_content_digest_depends_only_on_the_result(store: Store) -> None:
    manifests = []
    for key, data in (("k1", b"pixels"), ("k2", b"pixels"), ("k1", b"others")):
        folder = StageFolder(store, "prior", key)
        ref = folder.put("images/0.png", data)
        manifests.append(folder.finish(WithImage(**folder.head(1, counts={"things": len(manifests)}), image=ref)))
    first, elsewhere, other = (manifest.compute_content_digest() for manifest in manifests)
    assert first == elsewhere
    assert first != other


def test_a_damaged_resume_record_of_an_earlier_attempt_is_ignored(store: Store) -> None:
    folder = StageFolder(store, "prior", "k1")
    ref = folder.put_resumable("a.png", b"whole")
    note = f"{folder.prefix}/a.png.ref"
    data = bytearray(store.find_bytes(note) or b"")
    data[20] ^= 1
    for damaged in (bytes(data), bytes(data[:-5]), b"[]"):
        store.put_bytes(note, damaged)
        assert StageFolder(store, "prior", "k1").reuse("a.png") is None
    assert ref.size_bytes == 5


def test_a_file_is_hashed_once_per_run_and_again_when_it_changes(tmp_path: Path, monkeypatch: Any) -> None:
    store = LocalStore(tmp_path)
    ref = StageFolder(store, "prior", "k1").put("a", b"right")
    read: list[Path] = []
    real = store_module.digest_file
    monkeypatch.setattr(store_module, "digest_file", lambda path: (read.append(path), real(path))[1])
    for _ in range(3):
        verify(store, ref)
    assert len(read) == 1
    (tmp_path / ref.key).write_bytes(b"wrong")
    with pytest.raises(ArtifactCorrupt):
        verify(store, ref)
    assert len(read) == 2


def test_objects_in_a_bucket_are_verified_by_head_requests_alone(s3_config: StoreConfig, tmp_path: Path) -> None:
    store = S3Store(s3_config)
    folder = StageFolder(store, "prior", "k1")
    large = tmp_path / "large"
    large.write_bytes(b"x" * 9_000_000)  # in several parts
    refs = [folder.put("small", b"bytes"), folder.put_file("large", large)]
    sent: list[str] = []
    store.client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request.method))
    for ref in refs:
        verify(store, ref)
    assert sent == ["HEAD", "HEAD"]
    store.client.put_object(Bucket=store.bucket, Key=f"{store.prefix}/{refs[0].key}", Body=b"other")
    with pytest.raises(ArtifactCorrupt, match="has changed"):
        verify(store, refs[0])
