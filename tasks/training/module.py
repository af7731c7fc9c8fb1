"""The Lightning module: one forward over both halves, frozen VAE, learning rate by step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from tasks.diffusion.adapter import DTYPES, DiffusionModel
from tasks.diffusion.types import Conditioning
from tasks.training.data import rng
from tasks.training.data.dataset import BatchMaker, TrainingBatch, send
from tasks.training.losses import PriorPreservationLoss, min_snr_weights, prior_preservation_loss
from tasks.training.methods import Trainable, prepare
from tasks.training.optimizers import has_fused_skip, make_optimizer
from tasks.training.process.worker_spec import TrainingSpec, compute_learning_rate_factor
from tasks.training.sharding import shard, unshard


class DreamBoothModule(pl.LightningModule):
    """Fine-tunes what the configured method learns."""

    def __init__(self, model: DiffusionModel, spec: TrainingSpec, *, start_step: int = 0) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.start_step = start_step
        self.trainable: Trainable = prepare(model, spec)
        self.batches = BatchMaker(model, spec)  # after the token, which prompts are spelled with
        model.vae.cpu()  # its work is done
        self.fsdp = spec.training.fsdp and spec.training.world_size > 1
        if self.fsdp:
            shard(self.trainable, model.device)
        self.trained = self.trainable.modules
        if spec.training.gradient_checkpointing:
            checkpoint_gradients(model)
        self.grad_norm = torch.zeros(())
        self.is_skipped = torch.zeros((), dtype=torch.bool)
        self.optimizer = self.make_optimizer()
        self.ema = {n: p.detach().clone() for n, p in self.named_trained()} if spec.training.ema_decay else {}
        self.prompts = PromptCache(model) if self.is_text_frozen else None

    def named_trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return what is trained, by name."""
        return list(self.trainable.named_parameters())

    @property
    def is_text_frozen(self) -> bool:
        """Whether every prompt has the same encoding at every step."""
        return not any(name.startswith("text_encoder") for name in self.trainable.modules)

    @property
    def step(self) -> int:
        """Optimizer steps since the very beginning, over all resumed runs."""
        return self.start_step + int(self.trainer.global_step)

    def configure_model(self) -> None:
        """Leave the model as it is: where Lightning asks for shards, they are there."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer, whose optimizer_state a checkpoint may already have restored."""
        return self.optimizer

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer with one learning rate per group; vectors of a token don't decay."""
        decay = self.spec.training.weight_decay
        groups = [
            {
                "params": group.parameters,
                "lr": group.learning_rate,
                "base_lr": group.learning_rate,
                "weight_decay": 0.0 if group.name.endswith("_token") else decay,
            }
            for group in self.trainable.groups
        ]
        return make_optimizer(groups, self.spec.training)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Set rates and the dropout's seed as functions of the step, so that nothing has to be resumed."""
        for group in self.optimizer.param_groups:
            rate = group["base_lr"]
            group["lr"] = rate * compute_learning_rate_factor(self.spec.training, self.step, rate=rate)
        torch.manual_seed(rng.make_seed(self.spec.seed, "dropout", int(batch[0])))

    def training_step(self, indices: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of the samples that the indices stand for: one forward per size among them."""
        parts: dict[str, Tensor] = {}
        for batch in self.batches.make(indices.tolist(), self.device):
            loss = self.compute_loss(batch)
            # Lightning divides what it finds under "loss" by the number of accumulated forwards.
            told = {"loss": loss.total, "total_loss": loss.total.detach(), "instance_loss": loss.instance.detach()}
            if loss.prior is not None:
                told["prior_loss"] = loss.prior.detach()
            parts = {name: parts.get(name, 0.0) + batch.share * value for name, value in told.items()}
        return parts

    def compute_loss(self, batch: TrainingBatch) -> PriorPreservationLoss:
        """Return the loss of one batch and its halves."""
        training, noise = self.spec.training, self.model.noise_scheduler
        noisy_latents = noise.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = noise.compute_target(batch.latents, batch.noise, batch.timesteps)
        told = self.encode_unique(batch)
        noise_pred = self.model.predict(self.fit_dtype(noisy_latents), batch.timesteps, told, batch.time_ids)
        weights = None
        if training.snr_gamma is not None:
            weights = min_snr_weights(noise, batch.timesteps, snr_gamma=training.snr_gamma)
        return prior_preservation_loss(
            noise_pred,
            target,
            prior_loss_weight=training.prior_loss_weight,
            weights=weights,
            mask=batch.mask if training.background_loss_weight < 1 else None,
        )

    def fit_dtype(self, latents: Tensor) -> Tensor:
        """Return latents in the format of frozen weights: norms don't mix formats."""
        return latents.to(DTYPES[self.spec.training.weight_dtype])

    def encode_unique(self, batch: TrainingBatch) -> Conditioning:
        """Encode each different prompt once: the class half usually has just one.

        What differs is found on the CPU: on a GPU the answer's size would have to be waited for.
        """
        unique, inverse = torch.unique(batch.input_ids, dim=0, return_inverse=True)
        told = self.prompts.encode(unique) if self.prompts else self.model.encode_prompts(send(unique, self.device))
        return told.take(send(inverse, self.device))

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Leave resting groups out, clip the others together, keep the norm for the next check."""
        for group in self.trainable.groups:
            if not group.is_active(self.step):
                for parameter in group.parameters:
                    parameter.grad = None
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and has_fused_skip(self.optimizer):
            # Lightning leaves this to fused kernels, which would clip gradients that are still scaled.
            scaler.unscale_(self.optimizer)
        parameters = [parameter for _, parameter in self.named_trained()]
        self.grad_norm = unshard(torch.nn.utils.clip_grad_norm_(parameters, self.spec.training.max_grad_norm))
        self.is_skipped = ~torch.isfinite(self.grad_norm)
        if not has_fused_skip(self.optimizer):
            if bool(self.is_skipped):
                self.optimizer.zero_grad(set_to_none=True)
        elif self.spec.training.mixed_precision != "fp16":
            # The fused kernel leaves everything as it is where this says so, without asking the host;
            # in fp16 the gradient scaler sets it.
            self.optimizer.found_inf = self.is_skipped.float()  # type: ignore[attr-defined]

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the averaged weights toward the trained ones, faster in the beginning."""
        if not self.ema:
            return
        decay = min(self.spec.training.ema_decay, (1 + self.step) / (10 + self.step))
        for name, parameter in self.named_trained():
            self.ema[name] = self.ema[name].to(parameter).lerp_(parameter, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the averaged weights for a while, where ema are kept: they are what is published."""
        kept = {name: p.detach().clone() for name, p in self.named_trained()} if self.ema else {}
        self.take_average()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.named_trained():
                    if name in kept:
                        parameter.copy_(kept[name])

    @torch.no_grad()
    def take_average(self) -> None:
        """Put the averaged weights in place of the trained ones, to be published."""
        for name, parameter in self.named_trained():
            if name in self.ema:
                parameter.copy_(self.ema[name])

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the sample indices on the CPU, where rng are made."""
        return batch


class PromptCache:
    """Encodings of prompts, computed once: right only while no text encoder is trained."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self.rows: dict[bytes, Conditioning] = {}

    @torch.no_grad()
    def encode(self, input_ids: Tensor) -> Conditioning:
        """Return the conditioning of ids `(B, L)`, encoding those not met before."""
        keys = [row.numpy().tobytes() for row in input_ids]
        for i, key in enumerate(keys):
            if key not in self.rows:
                self.rows[key] = self.model.encode_prompts(input_ids[i : i + 1])
        rows = [self.rows[key] for key in keys]
        pooled = [row.pooled_prompt_embeds for row in rows if row.pooled_prompt_embeds is not None]
        return Conditioning(
            torch.cat([row.encoder_hidden_states for row in rows]), torch.cat(pooled) if pooled else None
        )


def checkpoint_gradients(model: DiffusionModel) -> None:
    """Recompute activations backward in the denoiser and the text encoders that are trained."""
    model.denoiser.enable_gradient_checkpointing()
    for encoder in model.text_encoders.values():
        if any(p.requires_grad for p in encoder.parameters()):
            # The reentrant kind needs inputs that require gradients, which token ids can't.
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
