"""Checkpoints that can be trusted."""

import json
from pathlib import Path

import pytest
import torch

from tasks.errors import TrainingFailed
from tasks.manifests.training import LossRow
from tasks.stage.digests import DIGEST_FIELD, sign
from tasks.training.checkpoint_io import MANIFEST, TrainingState, list_checkpoints, load_newest, save_checkpoint

FINGERPRINT = {"configuration": "c", "data": "d", "base model": "m"}


def state(step: int, value: float = 1.0) -> TrainingState:
    weights = {"w": torch.full((3,), value * step)}
    return TrainingState(step, weights, {"w|exp_avg": torch.ones(3)}, {"w": torch.zeros(3)}, [LossRow(step=1)])


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, state(step), fingerprint=FINGERPRINT, num_kept=2)


def test_the_newest_checkpoint_is_loaded_and_two_are_retained(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 10)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000004"]
    loaded = load_newest(tmp_path, fingerprint=FINGERPRINT)
    assert loaded is not None
    assert loaded.step == 10
    assert torch.equal(loaded.weights["w"], torch.full((3,), 10.0))
    assert loaded.losses == [LossRow(step=1)]


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "losses.jsonl", MANIFEST])
def test_a_flipped_byte_falls_back_to_the_previous_checkpoint(tmp_path: Path, name: str) -> None:
    save(tmp_path, 2, 4)
    path = tmp_path / "step-00000004" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    loaded = load_newest(tmp_path, fingerprint=FINGERPRINT)
    assert loaded is not None
    assert loaded.step == 2


def test_a_checkpoint_with_an_edited_step_is_ignored(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    path = tmp_path / "step-00000004" / MANIFEST
    path.write_text(path.read_text().replace('"step": 4', '"step": 5'))
    loaded = load_newest(tmp_path, fingerprint=FINGERPRINT)
    assert loaded is not None
    assert loaded.step == 2


def test_a_partially_written_checkpoint_is_ignored(tmp_path: Path) -> None:
    save(tmp_path, 2)
    torn = tmp_path / "step-00000004"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"torn")
    loaded = load_newest(tmp_path, fingerprint=FINGERPRINT)
    assert loaded is not None
    assert loaded.step == 2


def test_training_starts_fresh_without_checkpoints_and_raises_if_all_are_damaged(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "none", fingerprint=FINGERPRINT) is None
    save(tmp_path, 2)
    (tmp_path / "step-00000002" / "weights.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(TrainingFailed, match="no checkpoint in .* verifies"):
            load_newest(tmp_path, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("changed", list(FINGERPRINT))
def test_a_checkpoint_of_another_run_is_rejected_naming_the_changed_field(tmp_path: Path, changed: str) -> None:
    save(tmp_path, 2)
    with pytest.raises(TrainingFailed, match=f"belongs to another run: {changed} changed"):
        load_newest(tmp_path, fingerprint={**FINGERPRINT, changed: "other"})


def test_a_checkpoint_of_another_schema_version_is_rejected(tmp_path: Path) -> None:
    save(tmp_path, 2)
    path = tmp_path / "step-00000002" / MANIFEST
    manifest = {**json.loads(path.read_text()), "schema_version": 99}
    del manifest[DIGEST_FIELD]
    path.write_text(json.dumps(sign(manifest)))
    with pytest.raises(TrainingFailed, match="schema 99"):
        load_newest(tmp_path, fingerprint=FINGERPRINT)


def test_non_finite_weights_are_never_saved(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="weight w is not finite at step 3"):
        save_checkpoint(tmp_path, state(3, float("nan")), fingerprint=FINGERPRINT, num_kept=2)
    assert list_checkpoints(tmp_path) == []
