"""Retain the weights of the best validated steps, and write them in the published format."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.registry import load_model
from tasks.errors import ArtifactCorrupt
from tasks.manifests.training import LossRow
from tasks.stage.files import quarantine
from tasks.training.callbacks.ema import Ema
from tasks.training.callbacks.loss_log import LossLog
from tasks.training.callbacks.step import StepCallback, is_due
from tasks.training.checkpoint_io import TrainingState, copy_all, load_checkpoint, save_checkpoint
from tasks.training.config import ValidationSettings
from tasks.training.methods import prepare, save_learned
from tasks.training.module import DreamBoothModule
from tasks.training.process.checkpoint_files import list_checkpoints, step_of
from tasks.training.process.worker_spec import RunFolder, TrainingSpec

# Switches off the pruning by step in `save_checkpoint`: here retention goes by rank.
ALL = 1_000_000_000


class BestCheckpoints(StepCallback):
    """Retains the weights of the `save_top_k` best validated steps."""

    def __init__(self, spec: TrainingSpec, run: RunFolder, loss_log: LossLog, *, ema: Ema, fingerprint: dict[str, str]):
        self.spec = spec
        self.run = run
        self.loss_log = loss_log
        self.ema = ema
        self.fingerprint = fingerprint

    def on_step_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Save the weights if this step ranks among the best so far; all ranks take the same branch."""
        settings = self.spec.training.validation
        if settings.keep != "best" or not is_due(module.step, settings.validation_steps):
            return
        # The loss log precedes this callback and has flushed the row of this step, so it is ranked too.
        is_good = module.step in rank_steps(self.loss_log.rows, settings)[: settings.save_top_k]
        # All ranks must agree: gathering sharded weights is a collective.
        if not trainer.strategy.reduce_boolean_decision(is_good, all=False):
            return
        if trainer.is_global_zero or module.is_sharded:
            weights = copy_all(self.ema.published(module), is_kept=trainer.is_global_zero)
        if trainer.is_global_zero:
            # Weights alone, with the average applied: enough to publish, not to resume.
            state = TrainingState(module.step, weights, {}, {}, [])
            save_checkpoint(self.run.best, state, fingerprint=self.fingerprint, num_kept=ALL)
            # Saved first, then pruned: an interruption leaves one checkpoint too many, never one too few.
            best = rank_steps(self.loss_log.rows, settings)[: settings.save_top_k]
            for path in list_checkpoints(self.run.best):
                if step_of(path) not in best:
                    shutil.rmtree(path)


def rank_steps(rows: Sequence[LossRow], settings: ValidationSettings) -> list[int]:
    """Return the validated steps of a loss log, best first; ties go to the earlier step."""
    if settings.metric == "loss":
        # No NaN reaches the sort: the log holds None in place of non-finite values.
        found = [(row.validation_loss, row.step) for row in rows if row.validation_loss is not None]
    else:
        found = [(-row.validation_similarity, row.step) for row in rows if row.validation_similarity is not None]
    return [step for _, step in sorted(found)]  # ascending, hence the negated similarity


def list_candidates(run: RunFolder, losses: Sequence[LossRow], settings: ValidationSettings) -> list[Path]:
    """Return the retained checkpoints, best first."""
    kept = {step_of(path): path for path in list_checkpoints(run.best)}
    # Every validated step is ranked, but only retained ones have a folder.
    return [kept[step] for step in rank_steps(losses, settings) if step in kept]


def verify_candidates(
    run: RunFolder, losses: Sequence[LossRow], settings: ValidationSettings, *, fingerprint: dict[str, str]
) -> tuple[list[Path], list[Path]]:
    """Return the retained checkpoints that verify, best first, and the quarantined paths of those that don't."""
    whole, damaged = [], []
    for path in list_candidates(run, losses, settings):
        try:
            load_checkpoint(path, fingerprint=fingerprint)
            whole.append(path)
        except (OSError, ArtifactCorrupt):
            damaged.append(quarantine(path))
    return whole, damaged


def write_candidate(path: Path, spec: TrainingSpec, folder: Path, *, fingerprint: dict[str, str]) -> None:
    """Write a retained checkpoint in the published format."""
    write_weights(load_checkpoint(path, fingerprint=fingerprint).weights, spec, folder)


@torch.no_grad()
def write_weights(weights: dict[str, Tensor], spec: TrainingSpec, folder: Path) -> None:
    """Write trained weights in the published format, through a fresh base model on the CPU: device memory is full."""
    on_cpu = spec.model_copy(update={"diffusion": spec.diffusion.model_copy(update={"device": "cpu"})})
    model = open_base(on_cpu)
    # Recreates the parameters and their names; the initial values are overwritten.
    trainable = prepare(model, spec)
    for name, parameter in trainable.named_parameters():
        parameter.copy_(weights[name])
    save_learned(model, spec, trainable, folder=folder)


def open_base(spec: TrainingSpec) -> DiffusionModel:
    """Load the base model: in `weight_dtype` where it stays frozen, in float32 where all weights are trained."""
    base = spec.diffusion.model_copy(update={"pretrained_model_name_or_path": spec.model_folder})
    is_frozen = not spec.training.method.endswith("full")
    return load_model(base, precision=spec.training.weight_dtype if is_frozen else "fp32")
