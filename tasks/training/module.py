"""The Lightning module: one forward over both halves, frozen VAE, learning rate by step."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from tasks.diffusion.adapter import DTYPES, DiffusionModel
from tasks.diffusion.types import Conditioning
from tasks.training.data import rng
from tasks.training.data.batches import StepBatch, TrainingBatch, send
from tasks.training.losses import PriorPreservationLoss, min_snr_weights, prior_preservation_loss
from tasks.training.methods import Trainable, prepare
from tasks.training.optimizers import has_fused_skip, make_optimizer
from tasks.training.process.worker_spec import TrainingSpec, compute_learning_rate_factor
from tasks.training.sharding import shard, unshard


class DreamBoothModule(pl.LightningModule):
    """Fine-tunes what the configured method learns: instance and class images in one forward (arXiv 2208.12242)."""

    def __init__(self, model: DiffusionModel, spec: TrainingSpec, *, start_step: int = 0) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.start_step = start_step
        self.trainable: Trainable = prepare(model, spec)
        self.trained = self.trainable.modules
        self.is_sharded = spec.training.fsdp and spec.training.world_size > 1
        self.is_configured = False
        self.optimizer: torch.optim.Optimizer
        self.grad_norm = torch.zeros(())
        self.is_skipped = torch.zeros((), dtype=torch.bool)
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
        """Shard what is trained and turn on gradient checkpointing. Lightning may call this more than once."""
        if self.is_configured:
            return
        self.is_configured = True
        if self.is_sharded:
            shard(self.trainable, self.model.device)
        if self.spec.training.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer with one learning rate per group; textual inversion vectors don't decay."""
        training = self.spec.training
        groups = [
            {
                "params": group.parameters,
                "lr": group.learning_rate,
                "base_lr": group.learning_rate,
                "weight_decay": 0.0 if group.name.endswith("_token") else training.weight_decay,
            }
            for group in self.trainable.groups
        ]
        self.optimizer = make_optimizer(groups, training)
        return self.optimizer

    def on_train_batch_start(self, batch: StepBatch, batch_idx: int) -> None:
        """Set learning rates and the dropout seed as functions of the step, so that nothing has to be resumed."""
        for group in self.optimizer.param_groups:
            rate = group["base_lr"]
            group["lr"] = rate * compute_learning_rate_factor(self.spec.training, self.step, rate=rate)
        torch.manual_seed(rng.make_seed(self.spec.seed, "dropout", batch.indices[0]))

    def training_step(self, batch: StepBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return the losses of a rank's samples: scalars, means over all forwards."""
        means: dict[str, Tensor] = {}
        for forward in batch.forwards:
            loss = self.compute_loss(forward)
            # Lightning divides what it finds under "loss" by the number of accumulated forwards.
            found = {"loss": loss.total, "total_loss": loss.total.detach(), "instance_loss": loss.instance.detach()}
            if loss.prior is not None:
                found["prior_loss"] = loss.prior.detach()
            means = {name: means.get(name, 0.0) + forward.share * value for name, value in found.items()}
        return means

    def compute_loss(self, batch: TrainingBatch) -> PriorPreservationLoss:
        """Return the loss of one batch and its halves."""
        training, noise = self.spec.training, self.model.noise_scheduler
        noisy_latents = noise.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = noise.compute_target(batch.latents, batch.noise, batch.timesteps)
        conditioning = self.encode_unique(batch)
        noise_pred = self.model.predict(
            self.fit_dtype(noisy_latents), batch.timesteps, conditioning, time_ids=batch.time_ids
        )
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
        rows = self.prompts.encode(unique) if self.prompts else self.model.encode_prompts(send(unique, self.device))
        return rows.take(send(inverse, self.device))

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


def enable_gradient_checkpointing(model: DiffusionModel) -> None:
    """Recompute activations backward in the denoiser and the text encoders that are trained."""
    model.denoiser.enable_gradient_checkpointing()
    for encoder in model.text_encoders.values():
        if any(p.requires_grad for p in encoder.parameters()):
            # The reentrant kind needs inputs that require gradients, which token ids can't.
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
