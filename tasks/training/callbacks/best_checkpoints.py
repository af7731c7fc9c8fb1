"""Which weights are kept while training, best first, and how they are written in the end."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.registry import open_model
from tasks.errors import ArtifactCorrupt
from tasks.stage.files import quarantine
from tasks.training.checkpoint_io import TrainingState, list_checkpoints, load_checkpoint, save_checkpoint
from tasks.training.config import ValidationSettings
from tasks.training.methods import prepare, save_learned
from tasks.training.process.worker_spec import RunFolder, TrainingSpec

ALL = 1_000_000_000


def rank_steps(losses: list[str], settings: ValidationSettings) -> list[int]:
    """Return the validated steps of a loss log, best first; of equals, the earliest first."""
    name, sign = ("validation_loss", 1) if settings.metric == "loss" else ("validation_similarity", -1)
    rows = [json.loads(line) for line in losses if f'"{name}"' in line]
    found = [(sign * row[name], row["step"]) for row in rows if row[name] is not None]
    return [step for _, step in sorted(found)]


def is_candidate(losses: list[str], settings: ValidationSettings) -> bool:
    """Whether the last step of a loss log is among the best."""
    return json.loads(losses[-1])["step"] in rank_steps(losses, settings)[: settings.save_top_k]


def keep_candidate(
    run: RunFolder, spec: TrainingSpec, weights: dict[str, Tensor], losses: list[str], *, fingerprint: dict[str, str]
) -> None:
    """Save the weights of the last step, and drop those that are no longer among the best."""
    settings = spec.training.validation
    step = json.loads(losses[-1])["step"]
    save_checkpoint(run.best, TrainingState(step, weights, {}, {}, []), fingerprint=fingerprint, num_kept=ALL)
    best = rank_steps(losses, settings)[: settings.save_top_k]
    for path in list_checkpoints(run.best):
        if step_of(path) not in best:
            shutil.rmtree(path)


def list_candidates(run: RunFolder, losses: list[str], settings: ValidationSettings) -> list[Path]:
    """Return the kept weights, best first."""
    kept = {step_of(path): path for path in list_checkpoints(run.best)}
    return [kept[step] for step in rank_steps(losses, settings) if step in kept]


def verify_candidates(
    run: RunFolder, losses: list[str], settings: ValidationSettings, *, fingerprint: dict[str, str]
) -> tuple[list[Path], list[Path]]:
    """Return the kept weights that verify, best first, and those that don't, which are set aside."""
    whole, damaged = [], []
    for path in list_candidates(run, losses, settings):
        try:
            load_checkpoint(path, fingerprint=fingerprint)
            whole.append(path)
        except (OSError, ArtifactCorrupt):
            damaged.append(quarantine(path))
    return whole, damaged


def write_candidate(path: Path, spec: TrainingSpec, folder: Path, *, fingerprint: dict[str, str]) -> None:
    """Write kept weights as a model is published."""
    write_weights(load_checkpoint(path, fingerprint=fingerprint).weights, spec, folder)


@torch.no_grad()
def write_weights(weights: dict[str, Tensor], spec: TrainingSpec, folder: Path) -> None:
    """Write trained weights as a model is published, through a fresh base model; the devices are full."""
    on_cpu = spec.model_copy(update={"diffusion": spec.diffusion.model_copy(update={"device": "cpu"})})
    model = open_base(on_cpu)
    trainable = prepare(model, spec)
    for name, parameter in trainable.named_parameters():
        parameter.copy_(weights[name])
    save_learned(model, spec, trainable, folder)


def open_base(spec: TrainingSpec) -> DiffusionModel:
    """Load the base model: frozen weights in their own precision, what is fully trained in float32."""
    base = spec.diffusion.model_copy(update={"pretrained_model_name_or_path": spec.model_folder})
    is_frozen = not spec.training.method.endswith("full")
    return open_model(base, precision=spec.training.weight_dtype if is_frozen else "fp32")


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-").split(".")[0])
