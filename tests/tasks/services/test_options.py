"""Options of store, tracking and LLM roles: without its option a test here fails."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.services.config import StoreConfig, TrackingConfig
from tasks.services.llm.budget.ledger import Ledger
from tasks.services.llm.config import ROLES, CapabilityConfig, ProfileConfig
from tasks.services.llm.service import LlmService
from tasks.services.store.local import LocalStore
from tasks.services.store.open import open_store
from tasks.services.store.s3 import S3Store
from tasks.services.tracking.base import NoTracker
from tasks.services.tracking.mlflow_tracker import MlflowTracker
from tasks.services.tracking.open import open_tracker
from tests.support.config import make_config, make_llm_config
from tests.support.llm import CHAT, GOOD, SPEC
from tests.support.llm_server import scripted_server


def test_objects_are_stored_in_the_configured_folder(tmp_path: Path) -> None:
    store = open_store(make_config(StoreConfig, kind="local", folder=str(tmp_path / "elsewhere")))
    store.put_bytes("a/b", b"x")
    assert (tmp_path / "elsewhere" / "a" / "b").read_bytes() == b"x"


def test_keys_in_a_bucket_begin_with_the_configured_prefix(s3_config: StoreConfig) -> None:
    store = open_store(s3_config.model_copy(update={"prefix": "team/one"}))
    assert isinstance(store, S3Store)
    store.put_bytes("a", b"x")
    listed = store.client.list_objects_v2(Bucket=s3_config.bucket)["Contents"]
    assert [item["Key"] for item in listed] == ["team/one/a"]
    assert store.client.meta.endpoint_url == s3_config.endpoint_url


def test_the_s3_client_uses_the_configured_region_and_checksums(s3_config: StoreConfig) -> None:
    changes = {"region": "eu-west-3", "request_checksums": "when_required"}
    store = S3Store(s3_config.model_copy(update=changes))
    assert store.client.meta.region_name == "eu-west-3"
    assert store.client.meta.config.request_checksum_calculation == "when_required"
    assert not store.has_checksums


def test_the_bucket_is_named_in_the_path_or_in_the_host(s3_config: StoreConfig) -> None:
    styles = {
        style: S3Store(s3_config.model_copy(update={"addressing_style": style})).client.meta.config.s3
        for style in ("auto", "path")  # not `virtual`: no host of the bucket's name exists here
    }
    assert styles == {"auto": {"addressing_style": "auto"}, "path": {"addressing_style": "path"}}


def test_copies_of_a_buckets_objects_are_bounded_as_configured(s3_config: StoreConfig, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "store"
    own = s3_config.model_copy(update={"folder": str(folder), "cache_gb": 4e-6})
    store = S3Store(own)
    names = [hashlib.sha256(bytes([index]) * 1000).hexdigest() for index in range(6)]
    for index, name in enumerate(names):
        store.put_bytes(f"a/{index}", bytes([index]) * 1000)
        store.keep(name, bytes([index]) * 1000)
    kept = {path.name for path in (tmp_path / "runs" / "store-cache").iterdir()}
    assert 0 < len(kept) <= 4
    assert kept < set(names)
    assert S3Store(own.model_copy(update={"cache_gb": 0.0})).cache is None


def test_uploads_of_files_are_bounded_to_the_configured_rate(
    s3_config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    rates = []
    for rate in (None, 2.5):
        store = S3Store(s3_config.model_copy(update={"max_upload_rate": rate}))
        upload = store.client.upload_file

        def record(*names: str, Config: Any, upload: Any = upload, **options: Any) -> None:
            rates.append(Config.max_bandwidth)
            upload(*names, Config=Config, **options)

        monkeypatch.setattr(store.client, "upload_file", record)
        store.put_file("x", tmp_path / "file")
        assert store.find_bytes("x") == b"x"
    assert rates == [None, 2_500_000]  # bytes per second


def test_tracking_kind_selects_the_tracker(tmp_path: Path) -> None:
    assert isinstance(open_tracker(make_config(TrackingConfig, kind="none"), folder=tmp_path), NoTracker)
    assert isinstance(open_tracker(make_config(TrackingConfig, kind="mlflow"), folder=tmp_path), MlflowTracker)


def test_runs_are_tracked_in_the_configured_database_and_experiment(tmp_path: Path) -> None:
    config = make_config(TrackingConfig, uri=f"sqlite:///{tmp_path}/own.db", experiment="a study")
    tracker = MlflowTracker(config, folder=tmp_path)
    tracker.start(name="x", params={}, tags={})
    assert (tmp_path / "own.db").is_file()
    assert not (tmp_path / "mlflow.db").exists()
    run = tracker.client.get_run(tracker.run_id)
    assert tracker.client.get_experiment(run.info.experiment_id).name == "a study"


@pytest.mark.parametrize("role", ROLES)
def test_a_role_uses_its_own_profile(tmp_path: Path, role: str) -> None:
    able = CapabilityConfig(response_format="json_schema")
    with scripted_server() as general, scripted_server() as own:
        general.script(GOOD)
        own.script(GOOD)
        profiles = {
            name: ProfileConfig(base_url=server.url, model="asked-model", capabilities=able)
            for name, server in (("general", general), ("own", own))
        }
        config = make_llm_config(models="general", profiles=profiles, **{role: "own"})
        llm = LlmService(config, store=LocalStore(tmp_path / "store"), ledger=Ledger(tmp_path / "ledger.jsonl"))
        llm.ask(SPEC, role=role)
        assert (general.counts[CHAT], own.counts[CHAT]) == (0, 1)


def test_roles_without_their_own_profile_use_the_default_fallback_chain(tmp_path: Path) -> None:
    able = CapabilityConfig(response_format="json_schema")
    roles = [role for role in ROLES if role != "second_judge"]
    with scripted_server() as first, scripted_server() as second:
        first.script("no JSON")
        second.script(GOOD)
        profiles = {
            name: ProfileConfig(base_url=server.url, model="asked-model", capabilities=able)
            for name, server in (("a", second), ("b", first))
        }
        config = make_llm_config(models=("b", "a"), profiles=profiles)
        llm = LlmService(config, store=LocalStore(tmp_path / "store"), ledger=Ledger(tmp_path / "ledger.jsonl"))
        for number, role in enumerate(roles):
            assert llm.ask(replace(SPEC, repeat=number), role=role).profile == "a"
        assert second.counts[CHAT] == len(roles)
        assert first.counts[CHAT] >= len(roles)
