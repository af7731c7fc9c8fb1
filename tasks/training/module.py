"""The Lightning module: one forward over both halves, frozen VAE, learning rate by step."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from tasks.diffusion.base import DiffusionModel
from tasks.training.data import BatchMaker, TrainingBatch
from tasks.training.losses import prior_preservation_loss
from tasks.training.spec import TrainingSpec, compute_learning_rate_factor


class DreamBoothModule(pl.LightningModule):
    """Fine-tunes the denoiser and, where asked for, the text encoder."""

    def __init__(self, model: DiffusionModel, spec: TrainingSpec, *, start_step: int = 0) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.start_step = start_step
        self.batches = BatchMaker(model, spec)
        trained = model.trainable_modules(is_text_encoder_trained=spec.training.is_text_encoder_trained)
        self.trained = nn.ModuleDict(trained)
        self.trained.requires_grad_(True)
        self.trained.train()
        self.grad_norm = torch.zeros(())
        self.optimizer = self.make_optimizer()

    @property
    def step(self) -> int:
        """Optimizer steps since the very beginning, over all resumed runs."""
        return self.start_step + int(self.trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer, whose moments a checkpoint may already have restored."""
        return self.optimizer

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW with one learning rate per trained module."""
        config = self.spec.training
        rates = {"text_encoder": config.text_encoder_learning_rate or config.learning_rate}
        groups = [
            {"params": list(module.parameters()), "lr": rate, "base_lr": rate}
            for name, module in self.trained.items()
            for rate in [rates.get(name, config.learning_rate)]
        ]
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Set the learning rate as a function of the step, so that nothing has to be resumed."""
        factor = compute_learning_rate_factor(self.spec.training, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def training_step(self, indices: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of the batch that the sample indices stand for."""
        batch = self.batches.make(indices.tolist(), self.device)
        noisy_latents = self.model.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = self.model.compute_target(batch.latents, batch.noise, batch.timesteps)
        noise_pred = self.model.predict(noisy_latents, batch.timesteps, self.encode_unique(batch))
        loss = prior_preservation_loss(noise_pred, target, prior_loss_weight=self.spec.training.prior_loss_weight)
        parts = {"loss": loss.total, "instance_loss": loss.instance.detach()}
        if loss.prior is not None:
            parts["prior_loss"] = loss.prior.detach()
        return parts

    def encode_unique(self, batch: TrainingBatch) -> Tensor:
        """Encode each different prompt once: the class half usually has just one."""
        unique, inverse = torch.unique(batch.input_ids, dim=0, return_inverse=True)
        return self.model.encode_prompts(unique)[inverse]

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip all trained parameters together and keep the norm for the next check."""
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.trained.parameters(), self.spec.training.max_grad_norm)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the sample indices on the CPU, where draws are made."""
        return batch
