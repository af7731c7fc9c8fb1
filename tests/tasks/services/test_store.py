"""The contract of stores, for a folder and a bucket, and what only one of them has."""

from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.services.config import StoreConfig
from tasks.services.store.base import Store
from tasks.services.store.local import LocalStore
from tasks.services.store.open import open_store
from tasks.services.store.s3 import S3Store
from tests.support.store_contract import CONTRACT, Check


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_both_kinds_of_store_keep_the_contract(any_store: Store, tmp_path: Path, check: Check) -> None:
    check(any_store, tmp_path)


def test_a_store_that_ignores_conditional_writes_is_refused(s3_config: StoreConfig) -> None:
    store = S3Store(s3_config)
    with_conditions = S3Store(s3_config)

    def ignore(request: Any, **_: object) -> None:
        del request.headers["If-None-Match"]

    store.client.meta.events.register("before-sign.s3.PutObject", ignore)
    for _ in range(2):
        with pytest.raises(ConfigError, match="ignores conditional writes"):
            store.put_if_absent("once", b"1")
    assert store.find_bytes("once") is None
    assert with_conditions.put_if_absent("once", b"1")
    assert not with_conditions.put_if_absent("once", b"2")


def test_a_bucket_that_goes_away_loses_no_write_silently(s3_config: StoreConfig) -> None:
    store = S3Store(s3_config)
    store.client.delete_bucket(Bucket=store.bucket)
    for write in (store.put_bytes, store.put_if_absent):
        with pytest.raises(ServiceUnavailable):
            write("key", b"1")


def test_an_unwritable_folder_is_a_one_line_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(ConfigError, match="cannot write to .*file/store"):
        LocalStore(blocker / "store")


def test_a_missing_bucket_is_named_in_the_error(s3_config: StoreConfig) -> None:
    with pytest.raises(ConfigError, match="bucket nowhere does not exist"):
        S3Store(s3_config.model_copy(update={"bucket": "nowhere"}))
    with pytest.raises(ConfigError, match="store.bucket is empty"):
        open_store(s3_config.model_copy(update={"bucket": ""}))


def test_a_failed_write_leaves_the_old_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put_bytes("a", b"old")
    with pytest.raises(FileNotFoundError):
        store.put_file("a", tmp_path / "missing")
    assert store.find_bytes("a") == b"old"
    assert store.list_keys("") == ["a"]


def test_a_folder_at_the_key_of_an_object_is_moved_aside(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    for again in range(2):
        (store.path("01-subject/k/a.png") / "inner").mkdir(parents=True)
        assert store.find_bytes("01-subject/k/a.png") is None
        assert store.compute_sha256("01-subject/k/a.png") is None
        if again:
            assert store.put_if_absent("01-subject/k/a.png", b"x")
        else:
            store.put_bytes("01-subject/k/a.png", b"x")
        assert store.find_bytes("01-subject/k/a.png") == b"x"
        store.delete("01-subject/k/a.png")


def test_a_stored_file_is_read_only_under_all_its_hard_links(tmp_path: Path) -> None:
    store, made = LocalStore(tmp_path / "store"), tmp_path / "made"
    made.write_bytes(b"weights")
    store.put_file("03-training/k/model", made)
    store.get_file("03-training/k/model", tmp_path / "local")
    store.put_file("06-publishing/k/model", tmp_path / "local")
    names = [made, tmp_path / "local", *map(store.path, ("03-training/k/model", "06-publishing/k/model"))]
    assert {name.stat().st_mode & 0o777 for name in names} == {0o444}
    store.put_file("06-publishing/k/model", made)
    store.delete("06-publishing/k/model")
    assert store.find_bytes("03-training/k/model") == b"weights"


def test_an_object_that_was_written_where_there_was_none_is_readable_by_others(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert store.put_if_absent("a", b"x")
    store.put_bytes("b", b"x")
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "ab"} == {0o644}
