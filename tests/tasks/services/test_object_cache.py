"""Local copies of a bucket's objects: used where they verify, removed where they don't, never too many."""

import hashlib
import os
from pathlib import Path

import pytest

from tasks.errors import ServiceUnavailable
from tasks.manifests.base import ObjectRef
from tasks.services.config import StoreConfig
from tasks.services.store.object_cache import ObjectCache
from tasks.services.store.s3 import S3Store
from tasks.stage.cache import StageFolder, fetch_folder, read_verified


@pytest.fixture
def store(s3_config: StoreConfig, tmp_path: Path) -> S3Store:
    return S3Store(s3_config.model_copy(update={"folder": str(tmp_path / "runs" / "store")}))


def count_reads(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that each object which is read from the bucket goes into."""
    reads: list[str] = []

    plain = store.client.get_object  # downloads of files use it too
    monkeypatch.setattr(store.client, "get_object", lambda **named: (reads.append(named["Key"]), plain(**named))[1])
    return reads


def make_stage(store: S3Store, tmp_path: Path) -> tuple[ObjectRef, ObjectRef]:
    folder = StageFolder(store, "training", "k")
    (tmp_path / "weights").write_bytes(b"weights")
    return folder.put("losses", b"losses"), folder.put_file("model/weights", tmp_path / "weights")


def test_what_a_run_stored_is_not_read_back_from_the_bucket(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, weights = make_stage(store, tmp_path)
    reads = count_reads(store, monkeypatch)
    assert read_verified(store, losses) == b"losses"
    fetched = fetch_folder(store, [weights], below="model", folder=tmp_path / "fetched")
    assert (fetched / "weights").read_bytes() == b"weights"
    assert reads == []


def test_another_machine_reads_an_object_once(
    store: S3Store, s3_config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, weights = make_stage(store, tmp_path)
    other = S3Store(s3_config.model_copy(update={"folder": str(tmp_path / "other" / "store")}))
    reads = count_reads(other, monkeypatch)
    for number in range(2):
        assert read_verified(other, losses) == b"losses"
        fetch_folder(other, [weights], below="model", folder=tmp_path / f"fetched {number}")
    assert len(reads) == 2


@pytest.mark.parametrize("damage", [b"", b"Losses", b"losses and more"])
def test_a_damaged_copy_is_removed_and_read_from_the_bucket(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    losses, weights = make_stage(store, tmp_path)
    reads = count_reads(store, monkeypatch)
    assert store.cache is not None
    for ref in (losses, weights):
        path = store.cache.folder / ref.sha256
        path.unlink()
        path.write_bytes(damage)
    assert read_verified(store, losses) == b"losses"
    fetched = fetch_folder(store, [weights], below="model", folder=tmp_path / "fetched")
    assert (fetched / "weights").read_bytes() == b"weights"
    assert len(reads) == 2
    assert (store.cache.folder / losses.sha256).read_bytes() == b"losses"


def test_an_object_that_is_not_what_was_asked_for_is_not_kept(store: S3Store, tmp_path: Path) -> None:
    store.put_bytes("a", b"another")
    wanted = hashlib.sha256(b"wanted").hexdigest()
    assert store.find_bytes("a", sha256=wanted) == b"another"
    store.get_file("a", tmp_path / "file", sha256=wanted)
    assert store.cache is not None
    assert store.cache.find(wanted) is None
    with pytest.raises(ServiceUnavailable, match="object b is not in bucket"):
        store.get_file("b", tmp_path / "file", sha256=wanted)


def test_the_least_recently_used_copies_go_first(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path / "cache", max_bytes=1000)
    data = [bytes([index]) * 300 for index in range(4)]
    names = [hashlib.sha256(each).hexdigest() for each in data]
    for index in range(3):
        cache.add(names[index], data[index])
        os.utime(cache.folder / names[index], (index, index))
    assert cache.find(names[0]) == data[0]  # used again
    cache.add(names[3], data[3])
    assert [cache.find(name) is not None for name in names] == [True, False, True, True]
    cache.add(hashlib.sha256(b"x" * 501).hexdigest(), b"x" * 501)  # would throw out most others
    assert [cache.find(name) is not None for name in names] == [True, False, True, True]


def test_a_second_process_keeps_the_bound_too(tmp_path: Path) -> None:
    for process in range(5):
        cache = ObjectCache(tmp_path / "cache", max_bytes=1000)
        for index in range(3):
            data = bytes([process, index]) * 150
            cache.add(hashlib.sha256(data).hexdigest(), data)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 1000


def test_a_folder_that_takes_no_copies_costs_nothing_but_reads(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    cache = ObjectCache(tmp_path / "cache", max_bytes=1000)
    name = hashlib.sha256(b"x").hexdigest()
    cache.add(name, b"x")
    assert cache.find(name) is None
    assert not cache.get_file(name, tmp_path / "file")
