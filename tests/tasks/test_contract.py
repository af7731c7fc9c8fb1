"""Stage keys, manifests, digests."""

import pytest

from tasks.contract import MANIFEST_NAME, PREFIXES, StageFolder, compute_stage_key, find_manifest, read_verified
from tasks.errors import ArtifactCorrupt
from tasks.manifests import Manifest
from tasks.services.store import Store


def finish(folder: StageFolder) -> Manifest:
    return folder.finish(Manifest, version=1, counts={"things": 1})


def test_stage_key_depends_on_every_input() -> None:
    base = compute_stage_key("prior", version=1, settings={"steps": 3}, inputs=["a"])
    others = [
        compute_stage_key("subject", version=1, settings={"steps": 3}, inputs=["a"]),
        compute_stage_key("prior", version=2, settings={"steps": 3}, inputs=["a"]),
        compute_stage_key("prior", version=1, settings={"steps": 4}, inputs=["a"]),
        compute_stage_key("prior", version=1, settings={"steps": 3}, inputs=["b"]),
    ]
    assert len({base, *others}) == 5
    assert base == compute_stage_key("prior", version=1, settings={"steps": 3}, inputs=["a"])


def test_a_finished_stage_is_found_again(any_store: Store) -> None:
    folder = StageFolder(any_store, "prior", "k1")
    folder.put("images/0.png", b"pixels")
    assert find_manifest(any_store, Manifest, "prior", "k1") is None
    manifest = finish(folder)
    assert find_manifest(any_store, Manifest, "prior", "k1") == manifest


@pytest.mark.parametrize("damage", [b"pixelz", None])
def test_a_damaged_object_makes_the_stage_be_computed_again(any_store: Store, damage: bytes | None) -> None:
    folder = StageFolder(any_store, "prior", "k1")
    ref = folder.put("images/0.png", b"pixels")
    finish(folder)
    any_store.delete(ref.key)
    if damage is not None:
        any_store.put_bytes(ref.key, damage)
    assert find_manifest(any_store, Manifest, "prior", "k1") is None
    assert any_store.find_bytes(f"{PREFIXES['prior']}/k1/{MANIFEST_NAME}.quarantined") is not None


def test_a_torn_manifest_is_not_trusted(store: Store) -> None:
    folder = StageFolder(store, "prior", "k1")
    finish(folder)
    key = f"{folder.prefix}/{MANIFEST_NAME}"
    store.put_bytes(key, (store.find_bytes(key) or b"")[:-20])
    assert find_manifest(store, Manifest, "prior", "k1") is None


def test_an_object_of_an_earlier_attempt_is_reused_only_if_whole(store: Store) -> None:
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
