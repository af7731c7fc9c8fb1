"""Validation during training: a deterministic loss, and the similarity of samples of the current weights."""

import pytorch_lightning as pl
import torch
from torch import Tensor

from tasks.training.callbacks.ema import Ema
from tasks.training.callbacks.loss_log import LossLog
from tasks.training.callbacks.similarity import SimilarityMetric
from tasks.training.callbacks.step import StepCallback, is_due
from tasks.training.data import rng
from tasks.training.data.batches import BatchFactory
from tasks.training.data.datamodule import DreamBoothDataModule
from tasks.training.module import DreamBoothModule
from tasks.training.process.worker_spec import TrainingSpec

MAX_PHOTOS = 8
# Stand in for the uniform draws in [0, 1) that `sample_timesteps` maps to timesteps.
TIMESTEP_FRACTIONS = (0.1, 0.35, 0.6, 0.85)


class Validation(StepCallback):
    """Validates the weights that would be published every `validation_steps`; must precede the loss log."""

    def __init__(self, spec: TrainingSpec, loss_log: LossLog, ema: Ema) -> None:
        self.spec = spec
        self.loss_log = loss_log
        self.ema = ema
        self.metric: SimilarityMetric | None = None

    def on_step_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Validate when due, on every rank."""
        if not is_due(module.step, self.spec.training.validation.validation_steps):
            return
        # Lightning's autocast covers `training_step` only.
        with trainer.precision_plugin.forward_context(), self.ema.applied(module):
            found = {"validation_loss": compute_validation_loss(module, find_batches(trainer))}
            if self.spec.training.validation.metric == "similarity":
                # Created once: it loads the encoders and encodes the photos.
                self.metric = self.metric or SimilarityMetric(self.spec, module.device)
                found["validation_similarity"] = self.metric.measure(module)
        self.loss_log.add_validation(module.step, found)


def find_batches(trainer: pl.Trainer) -> BatchFactory:
    """Return the data module's batches."""
    data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it where it attaches data
    assert isinstance(data, DreamBoothDataModule)
    return data.batches


@torch.no_grad()
def compute_validation_loss(module: DreamBoothModule, batches: BatchFactory) -> Tensor:
    """Return the mean squared error on fixed photos, noise and timesteps: a scalar that depends on the weights alone.

    Uses the held-out photos where there are any, else instance images.
    """
    model = module.model
    # (image index, latents of its bucket, row within the bucket)
    rows = [(index, bucket.sets["instance"], row)
            for bucket in batches.buckets for row, index in enumerate(bucket.indices)]  # fmt: skip
    if batches.holdout:
        held = [(images, row) for images in batches.holdout for row in range(len(images))]
        rows = [(index, images, row) for index, (images, row) in enumerate(held)]
    was_training = [part.training for part in module.trained.values()]
    module.trained.eval()
    losses = []
    # By image index, so that the selection is independent of the order of buckets.
    for index, images, row in sorted(rows, key=lambda row: row[0])[:MAX_PHOTOS]:  # one by one: memory is full
        # Not the prompt cache: text encoders may be in training.
        conditioning = model.encode_prompts(images.input_ids[row : row + 1])
        shape = tuple(images.mean.shape[2:])
        eps = rng.draw_normal(shape, seed=0, purpose="validation", indices=[index]).to(module.device)
        # The posterior's mean of the first crop variant, without sampling: (1, C, h, w).
        latents, time_ids = images.mean[row, :1].to(module.device), images.time_ids[row, :1].to(module.device)
        for fraction in TIMESTEP_FRACTIONS:
            timesteps = model.noise_scheduler.sample_timesteps(torch.tensor([fraction], dtype=torch.float64)).to(
                module.device
            )
            noisy = model.noise_scheduler.add_noise(latents, eps, timesteps)
            target = model.noise_scheduler.compute_target(latents, eps, timesteps)
            # The error in float32, unweighted: neither min-SNR weights nor masks apply.
            losses.append(
                (
                    model.predict(
                        module.cast_to_weight_dtype(noisy), timesteps, conditioning, time_ids=time_ids
                    ).float()
                    - target
                )
                .square()
                .mean()
            )
    for part, mode in zip(module.trained.values(), was_training, strict=True):
        part.train(mode)
    return torch.stack(losses).mean()
