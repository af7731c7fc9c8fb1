"""Which weights are kept while training, best first, and how they are written in the end."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.registry import open_model
from tasks.errors import ArtifactCorrupt
from tasks.manifests.training import LossRow
from tasks.stage.files import quarantine
from tasks.training.callbacks.ema import Ema
from tasks.training.callbacks.loss_log import LossLog
from tasks.training.callbacks.step import StepCallback, is_due
from tasks.training.checkpoint_io import TrainingState, copy_all, list_checkpoints, load_checkpoint, save_checkpoint
from tasks.training.config import ValidationSettings
from tasks.training.methods import prepare, save_learned
from tasks.training.module import DreamBoothModule
from tasks.training.process.worker_spec import RunFolder, TrainingSpec

ALL = 1_000_000_000


class BestCheckpoints(StepCallback):
    """Keeps the weights of the best validated steps; they are published in the end."""

    def __init__(self, spec: TrainingSpec, run: RunFolder, loss_log: LossLog, *, ema: Ema, fingerprint: dict[str, str]):
        self.spec = spec
        self.run = run
        self.loss_log = loss_log
        self.ema = ema
        self.fingerprint = fingerprint

    def on_step_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Save the weights that would be published if they are among the best yet; ranks agree."""
        settings = self.spec.training.validation
        if settings.keep != "best" or not is_due(module.step, settings.validation_steps):
            return
        is_good = module.step in rank_steps(self.loss_log.rows, settings)[: settings.save_top_k]
        if not trainer.strategy.reduce_boolean_decision(is_good, all=False):
            return
        if trainer.is_global_zero or module.is_sharded:
            weights = copy_all(self.ema.published(module), is_kept=trainer.is_global_zero)
        if trainer.is_global_zero:
            state = TrainingState(module.step, weights, {}, {}, [])
            save_checkpoint(self.run.best, state, fingerprint=self.fingerprint, num_kept=ALL)
            best = rank_steps(self.loss_log.rows, settings)[: settings.save_top_k]
            for path in list_checkpoints(self.run.best):
                if step_of(path) not in best:
                    shutil.rmtree(path)


def rank_steps(rows: Sequence[LossRow], settings: ValidationSettings) -> list[int]:
    """Return the validated steps of a loss log, best first; of equals, the earliest first."""
    if settings.metric == "loss":
        found = [(row.validation_loss, row.step) for row in rows if row.validation_loss is not None]
    else:
        found = [(-row.validation_similarity, row.step) for row in rows if row.validation_similarity is not None]
    return [step for _, step in sorted(found)]


def list_candidates(run: RunFolder, losses: Sequence[LossRow], settings: ValidationSettings) -> list[Path]:
    """Return the kept weights, best first."""
    kept = {step_of(path): path for path in list_checkpoints(run.best)}
    return [kept[step] for step in rank_steps(losses, settings) if step in kept]


def verify_candidates(
    run: RunFolder, losses: Sequence[LossRow], settings: ValidationSettings, *, fingerprint: dict[str, str]
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
    save_learned(model, spec, trainable, folder=folder)


def open_base(spec: TrainingSpec) -> DiffusionModel:
    """Load the base model: frozen weights in their own precision, what is fully trained in float32."""
    base = spec.diffusion.model_copy(update={"pretrained_model_name_or_path": spec.model_folder})
    is_frozen = not spec.training.method.endswith("full")
    return open_model(base, precision=spec.training.weight_dtype if is_frozen else "fp32")


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-").split(".")[0])
