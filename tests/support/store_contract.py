"""What every store does, whichever server is behind it."""

import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.services.store.base import Store
from tasks.stage.digests import digest_file

Check = Callable[[Store, Path], None]
"""Takes an empty store and a folder for files."""


def read_returns_the_latest_object_or_none(store: Store, folder: Path) -> None:
    store.put_bytes("a/b.bin", b"one")
    store.put_bytes("a/b.bin", b"two")
    assert store.find_bytes("a/b.bin") == b"two"
    assert store.find_bytes("a/none") is None
    assert store.compute_sha256("a/none") is None
    with pytest.raises(ServiceUnavailable):
        store.get_file("a/none", folder / "none")
    assert not (folder / "none").exists()


def a_file_round_trips_with_its_digest(store: Store, folder: Path) -> None:
    source, target = folder / "source", folder / "target"
    source.write_bytes(b"x" * 9_000_000)  # more than one part of an S3 upload
    store.put_file("big file é+%", source)
    store.get_file("big file é+%", target)
    assert target.read_bytes() == source.read_bytes()
    assert store.compute_sha256("big file é+%") == digest_file(source)


def a_listing_is_sorted_and_limited_to_its_prefix(store: Store, folder: Path) -> None:
    for key in ("p/2", "p/1", "q/1", "p/sub/3"):
        store.put_bytes(key, b"")
    assert store.list_keys("p/") == ["p/1", "p/2", "p/sub/3"]
    assert [item.size_bytes for item in store.list_objects("q/")] == [0]
    store.delete("p/1")
    store.delete("p/1")
    assert store.list_keys("p/") == ["p/2", "p/sub/3"]


def one_of_many_concurrent_conditional_writes_succeeds(store: Store, folder: Path) -> None:
    wins: list[int] = []

    def create(number: int) -> None:
        if store.put_if_absent("once", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert store.find_bytes("once") == str(wins[0]).encode()


def keys_cannot_leave_the_root(store: Store, folder: Path) -> None:
    for key in ("/etc/passwd", "../outside", "a/../../b", ""):
        with pytest.raises(ConfigError, match="not a plain relative path"):
            store.put_bytes(key, b"")


def a_presigned_address_gives_the_object(store: Store, folder: Path) -> None:
    """Of S3 alone: a folder has no addresses."""
    store.put_bytes("photo.png", b"pixels")
    with urllib.request.urlopen(store.presign("photo.png", seconds=60), timeout=10) as response:
        assert response.read() == b"pixels"


CONDITIONAL: list[Check] = [one_of_many_concurrent_conditional_writes_succeeds]
UNCONDITIONAL: list[Check] = [
    read_returns_the_latest_object_or_none,
    a_file_round_trips_with_its_digest,
    a_listing_is_sorted_and_limited_to_its_prefix,
    keys_cannot_leave_the_root,
]
CONTRACT = UNCONDITIONAL + CONDITIONAL
