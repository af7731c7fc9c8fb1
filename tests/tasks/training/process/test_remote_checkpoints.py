"""Checkpoints in the store: uploaded in the background, verified and fetched by a machine with an empty disk."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.errors import LeaseLost
from tasks.manifests.training import LossRow
from tasks.services.store.base import Store
from tasks.services.store.local import LocalStore
from tasks.training.checkpoint_io import TrainingState, save_checkpoint
from tasks.training.config import TrainingConfig
from tasks.training.process.checkpoint_files import MANIFEST, list_checkpoints
from tasks.training.process.remote_checkpoints import CheckpointUploader, RemoteCheckpoints
from tasks.training.process.worker_spec import RunFolder
from tests.support.config import make_config
from tests.support.tiny import make_spec, read_unet, train_here

FINGERPRINT = {"configuration": "c"}
PREFIX = "03-training/k/resume/checkpoints"


def trust() -> None:
    """Hold the lease."""


def save(run: RunFolder, *steps: int) -> None:
    for step in steps:
        weights = {"w": torch.full((3,), float(step))}
        state = TrainingState(step, weights, {}, {}, [LossRow(step=1)])
        save_checkpoint(run.checkpoints, state, fingerprint=FINGERPRINT, num_kept=2)


def open_machine(store: Store, folder: Path) -> RemoteCheckpoints:
    folder.mkdir(exist_ok=True)
    return RemoteCheckpoints(store, "03-training/k", RunFolder(folder))


def upload(machine: RemoteCheckpoints, *steps: int) -> None:
    for step in steps:
        save(machine.run, step)
        assert machine.upload_newest(num_kept=2, check=trust) == step


def test_training_resumed_on_a_machine_with_an_empty_disk_is_bit_identical(
    any_store: Store, tmp_path: Path, tiny_model_folder: Path
) -> None:
    options: dict[str, Any] = {
        "max_train_steps": 8, "checkpointing_steps": 2, "checkpoints_total_limit": 10, "ema_decay": 0.9,
        "validation": {"validation_steps": 2, "keep": "best", "save_top_k": 2, "sample_steps": 4,
                       "sample_num_inference_steps": 2},
    }  # fmt: skip
    spec = make_spec(tmp_path / "first", tiny_model_folder, **options)
    whole = train_here(tmp_path / "first", tiny_model_folder, spec=spec)
    losses, unet = whole.losses.read_text(), read_unet(whole)
    # What a machine that dies at step 5 leaves: the state of step 4, without anything later.
    for folder in (whole.checkpoints, whole.best):
        for path in list_checkpoints(folder):
            if int(path.name.removeprefix("step-")) > 4:
                shutil.rmtree(path)
    (whole.samples / "step-00000008.png").unlink()
    assert RemoteCheckpoints(any_store, "03-training/k", whole).upload_newest(num_kept=2, check=trust) == 4

    second = spec.model_copy(update={"folder": str(tmp_path / "second")})
    machine = open_machine(any_store, second.path)
    assert machine.fetch() == 4
    assert machine.fetch() is None  # the local one is as new
    run = train_here(second.path, tiny_model_folder, spec=second)
    assert '"start_step":4' in run.result.read_text().replace(" ", "")
    assert run.losses.read_text() == losses
    assert all(torch.equal(tensor, read_unet(run)[name]) for name, tensor in unet.items())
    assert sorted(path.name for path in run.samples.iterdir()) == ["step-00000004.png", "step-00000008.png"]


def test_two_checkpoints_are_kept_in_the_store_and_the_newest_is_fetched(any_store: Store, tmp_path: Path) -> None:
    upload(open_machine(any_store, tmp_path / "a"), 2, 4, 6)
    second = open_machine(any_store, tmp_path / "b")
    assert second.list_steps("checkpoints") == [6, 4]
    assert second.fetch() == 6
    second.delete_all()
    assert any_store.list_keys("03-training/k/") == []


def test_nothing_is_uploaded_twice(tmp_path: Path) -> None:
    machine = open_machine(LocalStore(tmp_path / "store"), tmp_path / "a")
    upload(machine, 2)
    assert machine.upload_newest(num_kept=2, check=trust) is None


@pytest.mark.parametrize("name", ["weights.safetensors", MANIFEST])
def test_a_damaged_checkpoint_in_the_store_falls_back_to_the_previous_one(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(tmp_path / "store")
    upload(open_machine(store, tmp_path / "a"), 2, 4)
    key = f"{PREFIX}/step-00000004/{name}"
    data = bytearray(store.find_bytes(key) or b"")
    data[len(data) // 2] ^= 1
    store.delete(key)
    store.put_bytes(key, bytes(data))
    machine = open_machine(store, tmp_path / "b")
    assert machine.fetch() == 2
    assert "checkpoint step-00000004 in the store is damaged" in caplog.text
    assert [path.name for path in machine.run.checkpoints.iterdir()] == ["step-00000002"]


def test_an_interrupted_upload_is_not_visible(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    machine = open_machine(store, tmp_path / "a")
    upload(machine, 2)
    save(machine.run, 4)
    calls: list[int] = []

    def lose_at_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise LeaseLost("taken over")

    with pytest.raises(LeaseLost):
        machine.upload_newest(num_kept=2, check=lose_at_third)
    assert any("step-00000004" in key for key in store.list_keys(PREFIX))
    assert open_machine(store, tmp_path / "b").fetch() == 2


def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    from tasks.stage.digests import dump_signed
    from tasks.training.process.checkpoint_files import SCHEMA_VERSION, CheckpointManifest

    store = LocalStore(tmp_path / "store")
    files = {"../../escaped": "0" * 64}
    manifest = CheckpointManifest(schema_version=SCHEMA_VERSION, step=4, fingerprint={}, files=files)
    store.put_bytes(f"{PREFIX}/step-00000004/{MANIFEST}", dump_signed(manifest))
    assert open_machine(store, tmp_path / "b").fetch() is None


@pytest.mark.parametrize("is_enabled", [True, False])
def test_checkpoints_are_uploaded_in_the_background_unless_disabled(tmp_path: Path, is_enabled: bool) -> None:
    store = LocalStore(tmp_path / "store")
    machine = open_machine(store, tmp_path / "a")
    config = make_config(TrainingConfig, upload_checkpoints=is_enabled)
    with CheckpointUploader(machine, config, check=trust) as uploader:
        save(machine.run, 2)
        uploader.notify()
        deadline = time.monotonic() + 60
        while is_enabled and machine.list_steps("checkpoints") != [2]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert machine.list_steps("checkpoints") == ([2] if is_enabled else [])


def test_the_last_checkpoint_is_uploaded_if_training_is_interrupted(tmp_path: Path) -> None:
    machine = open_machine(LocalStore(tmp_path / "store"), tmp_path / "a")
    config = make_config(TrainingConfig)
    save(machine.run, 2)

    def train() -> None:
        with CheckpointUploader(machine, config, check=trust):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert machine.list_steps("checkpoints") == [2]
