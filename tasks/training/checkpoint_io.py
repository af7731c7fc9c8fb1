"""Verified checkpoints: safetensors and JSON with their digests in a manifest, made visible by an atomic rename.

A checkpoint is the folder `step-00000100/`. It is written to a staging folder, synced and renamed, so it
exists completely or not at all. Loading verifies every digest and falls back to the previous checkpoint.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks.errors import ArtifactCorrupt, TrainingFailed
from tasks.manifests.training import LossRow, dump_losses, parse_losses
from tasks.stage.digests import digest_file, dump_signed, load_signed
from tasks.stage.files import sync
from tasks.stage.tensor_files import count_bytes, explain_full_tensors
from tasks.training.process.checkpoint_files import (
    MANIFEST,
    SCHEMA_VERSION,
    CheckpointManifest,
    list_checkpoints,
)
from tasks.training.sharding import shard_like, unshard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """The contents of a checkpoint: tensors on the CPU, by parameter name; `optimizer_state` by `name|key`."""

    step: int
    weights: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    ema: dict[str, Tensor]
    """EMA weights; empty where EMA is disabled."""
    losses: list[LossRow]
    """The loss log up to this step."""
    groups: list[dict[str, float]] = field(default_factory=list)
    """Scalars of each parameter group, such as Prodigy's estimate of the learning rate."""
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the fp16 gradient scaler; empty without fp16."""


def save_checkpoint(folder: Path, state: TrainingState, *, fingerprint: dict[str, str], num_kept: int) -> Path:
    """Write a checkpoint, then delete all but the newest `num_kept`.

    Raises:
        TrainingFailed: a weight isn't finite, or the folder can't be written. Earlier checkpoints are kept.
        StorageFull: the disk is full. Earlier checkpoints are kept.

    """
    for name, tensor in state.weights.items():
        if not torch.isfinite(tensor).all():
            raise TrainingFailed(f"weight {name} is not finite at step {state.step}; lower training.learning_rate")
    target = folder / f"step-{state.step:08d}"
    staged = folder / f".part-{target.name}"  # in the same folder: a rename works within one file system only
    size_bytes = sum(map(count_bytes, (state.weights, state.optimizer_state, state.ema)))
    try:
        with explain_full_tensors(target, size_bytes=size_bytes):
            write_checkpoint(staged, state, fingerprint=fingerprint)
            # A folder can't replace a non-empty one. Best weights of a step that is trained again after a resume exist.
            shutil.rmtree(target, ignore_errors=True)
            os.replace(staged, target)
            sync(folder)
    except (OSError, SafetensorError) as error:
        raise TrainingFailed(f"cannot save step {state.step} in {folder}: {error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    # Only now: at no moment are there fewer valid checkpoints than before.
    for old in list_checkpoints(folder)[num_kept:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def write_checkpoint(staged: Path, state: TrainingState, *, fingerprint: dict[str, str]) -> None:
    """Write every file of a checkpoint, its manifest last, and flush them to disk."""
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    save_file(state.weights, staged / "weights.safetensors")
    save_file(state.optimizer_state, staged / "optimizer.safetensors")
    save_file(state.ema, staged / "ema.safetensors")
    (staged / "numbers.json").write_text(json.dumps({"groups": state.groups, "scaler": state.scaler}))
    (staged / "losses.jsonl").write_text(dump_losses(state.losses))
    # Listed before the manifest is written, which therefore does not list itself.
    files = {path.name: digest_file(path) for path in sorted(staged.iterdir())}
    manifest = CheckpointManifest(schema_version=SCHEMA_VERSION, step=state.step, fingerprint=fingerprint, files=files)
    (staged / MANIFEST).write_bytes(dump_signed(manifest, indent=1))
    # Contents reach the disk before the caller's rename does, or a power loss could leave a complete-looking folder.
    for path in staged.iterdir():
        sync(path)
    sync(staged)


def load_newest(folder: Path, *, fingerprint: dict[str, str]) -> TrainingState | None:
    """Return the newest checkpoint that verifies, or None if there are no checkpoints.

    Raises:
        TrainingFailed: a checkpoint belongs to another configuration, data or base model; or
            checkpoints exist and none verifies.

    """
    found = list_checkpoints(folder)
    for path in found:
        try:
            return load_checkpoint(path, fingerprint=fingerprint)
        except (OSError, ArtifactCorrupt) as error:
            log.warning("checkpoint %s is damaged (%s); trying the one before", path.name, error)
            with contextlib.suppress(OSError):  # another rank may have moved it already
                # `os.replace` needs an empty or absent target folder.
                shutil.rmtree(folder / f".bad-{path.name}", ignore_errors=True)
                os.replace(path, folder / f".bad-{path.name}")
    # Damaged checkpoints, even those an earlier attempt found, never lead to a silent restart from step 0.
    if found or list(folder.glob(".bad-*")):
        raise TrainingFailed(f"no checkpoint in {folder} verifies; delete that folder to start over")
    return None


def load_checkpoint(path: Path, *, fingerprint: dict[str, str]) -> TrainingState:
    """Read and verify one checkpoint.

    Raises:
        ArtifactCorrupt: a file differs from its digest.
        TrainingFailed: the schema or the fingerprint differs from this run's.

    """
    manifest = load_signed(CheckpointManifest, (path / MANIFEST).read_bytes())
    if manifest.schema_version != SCHEMA_VERSION:
        raise TrainingFailed(f"{path} has schema {manifest.schema_version}, not {SCHEMA_VERSION}; delete it")
    changed = [name for name, value in fingerprint.items() if manifest.fingerprint.get(name) != value]
    if changed:
        raise TrainingFailed(f"{path} belongs to another run: {', '.join(changed)} changed; delete it to start over")
    # Before anything is parsed.
    for name, expected in manifest.files.items():
        if digest_file(path / name) != expected:
            raise ArtifactCorrupt(f"{name} differs from its manifest")
    return TrainingState(
        step=manifest.step,
        weights=load_file(path / "weights.safetensors"),
        optimizer_state=load_file(path / "optimizer.safetensors"),
        ema=load_file(path / "ema.safetensors"),
        losses=parse_losses((path / "losses.jsonl").read_text()),
        **json.loads((path / "numbers.json").read_text()),
    )


@dataclass(frozen=True)
class LiveState:
    """References to the state of a running training: tensors on their devices, DTensors where sharded."""

    step: int
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Mapping[str, Tensor]
    losses: list[LossRow]
    scaler: dict[str, float]


def collect_state(live: LiveState, *, is_writer: bool = True) -> TrainingState:
    """Copy weights, EMA and optimizer state to the CPU, by parameter name.

    With sharded state this is a collective: every rank calls it, and only the writer keeps the result.
    """
    weights = copy_all(live.parameters, is_kept=is_writer)
    optimizer_state: dict[str, Tensor] = {}
    for name, parameter in live.parameters.items():
        # Keyed by parameter name, where `Optimizer.state_dict` has indices.
        values = live.optimizer.state.get(parameter, {})
        # State values may be plain numbers, such as the `step` of bitsandbytes; safetensors holds tensors only.
        state = {f"{name}|{key}": torch.as_tensor(value) for key, value in values.items()}
        optimizer_state |= copy_all(state, is_kept=is_writer)
    return TrainingState(
        step=live.step,
        weights=weights,
        optimizer_state=optimizer_state,
        ema=copy_all(live.ema, is_kept=is_writer),
        losses=list(live.losses),
        groups=[
            # Numbers alone: `params` are the parameters, and betas are constants.
            {key: value for key, value in group.items() if isinstance(value, int | float)}
            for group in live.optimizer.param_groups
        ],
        scaler=live.scaler,
    )


def copy_all(tensors: Mapping[str, Tensor], *, is_kept: bool = True) -> dict[str, Tensor]:
    """Return full, contiguous copies on the CPU; DTensors are gathered from all ranks."""
    copies = {}
    for name, tensor in tensors.items():
        whole = unshard(tensor.detach())
        if is_kept:  # safetensors needs contiguous tensors; `clone`, since on the CPU `cpu()` aliases the parameter
            copies[name] = whole.cpu().contiguous().clone()
    return copies


@torch.no_grad()
def restore_state(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: TrainingState
) -> None:
    """Load a checkpoint's weights and optimizer state in place. Raises KeyError where a weight is missing."""
    per_parameter: dict[str, dict[str, Tensor]] = {}
    for joined, value in state.optimizer_state.items():
        name, key = joined.rsplit("|", 1)  # the last `|`: a state key holds none
        per_parameter.setdefault(name, {})[key] = value
    for group, numbers in zip(optimizer.param_groups, state.groups, strict=True):
        group.update(numbers)  # Prodigy keeps its estimate `d` here
    for name, parameter in parameters.items():
        parameter.copy_(shard_like(state.weights[name], like=parameter))
        optimizer_state = per_parameter.get(name, {})
        # Not `load_state_dict`, which casts state to the parameter's dtype; parameters without a step have none.
        if optimizer_state:
            optimizer.state[parameter] = {
                key: shard_like(value, like=parameter) for key, value in optimizer_state.items()
            }
