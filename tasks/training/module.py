"""The Lightning module: instance and class images in one forward, learning rate as a function of the step."""

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
from tasks.training.optimizers import make_optimizer, supports_found_inf
from tasks.training.process.worker_spec import TrainingSpec, compute_learning_rate_factor
from tasks.training.sharding import shard, unshard


class DreamBoothModule(pl.LightningModule):
    """Fine-tunes the parameters of the configured method with prior preservation (arXiv 2208.12242)."""

    def __init__(self, model: DiffusionModel, spec: TrainingSpec, *, start_step: int = 0) -> None:
        super().__init__()
        # Not an `nn.Module`: components outside `trained` stay unregistered, so Lightning and DDP ignore them.
        self.model = model
        self.spec = spec
        self.start_step = start_step
        self.trainable: Trainable = prepare(model, spec)
        # Registered as a submodule, so that Lightning moves it and DDP synchronizes its gradients.
        self.trained = self.trainable.modules
        self.is_sharded = spec.training.fsdp and spec.training.world_size > 1
        self.is_configured = False
        self.optimizer: torch.optim.Optimizer
        self.grad_norm = torch.zeros(())
        self.is_skipped = torch.zeros((), dtype=torch.bool)
        self.prompts = PromptCache(model) if self.is_text_frozen else None

    def named_trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the trained parameters by name; DTensors once the module is sharded."""
        return list(self.trainable.named_parameters())

    @property
    def is_text_frozen(self) -> bool:
        """Whether no text encoder, adapter or token embedding is trained, so that prompt embeddings are constant."""
        return not any(name.startswith("text_encoder") for name in self.trainable.modules)

    @property
    def step(self) -> int:
        """Completed optimizer steps, those before a resume included."""
        return self.start_step + int(self.trainer.global_step)

    def configure_model(self) -> None:
        """Shard the trained modules and enable gradient checkpointing. Lightning may call this more than once."""
        if self.is_configured:
            return
        self.is_configured = True
        if self.is_sharded:
            shard(self.trainable, self.model.device)
        if self.spec.training.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer with one learning rate per group; token embeddings get no weight decay."""
        training = self.spec.training
        groups = [
            {
                "params": group.parameters,
                "lr": group.learning_rate,
                "base_lr": group.learning_rate,  # `lr` is overwritten at every step
                "weight_decay": 0.0 if group.name.endswith("_token") else training.weight_decay,
            }
            for group in self.trainable.groups
        ]
        self.optimizer = make_optimizer(groups, training)
        return self.optimizer

    @property
    def learning_rate(self) -> float:
        """The last step's learning rate of the first parameter group; prodigy scales it by its estimate `d`."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"]) * float(group.get("d", 1.0))

    def on_train_batch_start(self, batch: StepBatch, batch_idx: int) -> None:
        """Set learning rates and the dropout seed from the step, so that neither is checkpointed state."""
        for group in self.optimizer.param_groups:
            rate = group["base_lr"]
            group["lr"] = rate * compute_learning_rate_factor(self.spec.training, self.step, rate=rate)
        # The first sample index is unique to step, micro-batch and rank, so dropout masks differ between ranks.
        torch.manual_seed(rng.make_seed(self.spec.seed, "dropout", batch.indices[0]))

    def training_step(self, batch: StepBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return scalar losses, averaged over this rank's samples of the micro-batch."""
        means: dict[str, Tensor] = {}
        for forward in batch.forwards:
            loss = self.compute_loss(forward)
            # Lightning divides what it finds under "loss" by the number of accumulated forwards.
            found = {"loss": loss.total, "total_loss": loss.total.detach(), "instance_loss": loss.instance.detach()}
            if loss.prior is not None:
                found["prior_loss"] = loss.prior.detach()
            # Aspect-ratio buckets make forwards of unequal size, which `sample_fraction` weights.
            means = {name: means.get(name, 0.0) + forward.sample_fraction * value for name, value in found.items()}
        return means

    def compute_loss(self, batch: TrainingBatch) -> PriorPreservationLoss:
        """Return the loss of one batch `[instance | class]` and its halves."""
        # Latents, noise and target stay in float32: only the denoiser's input takes the weights' dtype.
        training, noise = self.spec.training, self.model.noise_scheduler
        noisy_latents = noise.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = noise.compute_target(batch.latents, batch.noise, batch.timesteps)
        conditioning = self.encode_unique(batch)
        noise_pred = self.model.predict(
            self.cast_to_weight_dtype(noisy_latents), batch.timesteps, conditioning, time_ids=batch.time_ids
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

    def cast_to_weight_dtype(self, latents: Tensor) -> Tensor:
        """Cast latents to `weight_dtype`: normalization layers don't accept mixed dtypes."""
        return latents.to(DTYPES[self.spec.training.weight_dtype])

    def encode_unique(self, batch: TrainingBatch) -> Conditioning:
        """Encode each distinct prompt once; the class half usually has a single one.

        Runs `torch.unique` on the CPU: its output size depends on the data, so on a GPU it would synchronize.
        """
        unique, inverse = torch.unique(batch.input_ids, dim=0, return_inverse=True)
        # (U, L) distinct prompts -> (U, L, D) states and (U, P) pooled embeddings
        rows = self.prompts.encode(unique) if self.prompts else self.model.encode_prompts(send(unique, self.device))
        # Back to one row per sample of the batch.
        return rows.take(send(inverse, self.device))

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Drop gradients of inactive groups, clip the rest by their joint norm, and mark a non-finite step as skipped.

        Replaces Lightning's own clipping, which refuses optimizers with a fused gradient scaler.
        """
        for group in self.trainable.groups:
            if not group.is_active(self.step):
                # None, not zero: AdamW would still apply weight decay and stale momentum.
                for parameter in group.parameters:
                    parameter.grad = None
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and supports_found_inf(self.optimizer):
            # Lightning leaves unscaling to the fused kernel, which runs after clipping: the norm would be of scaled
            # gradients. GradScaler unscales only once per step, so the kernel does not repeat it.
            scaler.unscale_(self.optimizer)
        parameters = [parameter for _, parameter in self.named_trained()]
        self.grad_norm = unshard(torch.nn.utils.clip_grad_norm_(parameters, self.spec.training.max_grad_norm))
        self.is_skipped = ~torch.isfinite(self.grad_norm)
        if not supports_found_inf(self.optimizer):
            # Synchronizes with the device; without gradients the optimizer's step changes nothing.
            if bool(self.is_skipped):
                self.optimizer.zero_grad(set_to_none=True)
        elif self.spec.training.mixed_precision != "fp16":
            # The fused kernel skips its update where `found_inf` is 1, without a synchronization. In fp16 the gradient
            # scaler sets it.
            self.optimizer.found_inf = self.is_skipped.float()  # type: ignore[attr-defined]


class PromptCache:
    """Prompt embeddings, computed once; valid only while no text encoder is trained."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self.rows: dict[bytes, Conditioning] = {}

    @torch.no_grad()
    def encode(self, input_ids: Tensor) -> Conditioning:
        """Return the conditioning of ids `(B, L)` on the CPU, encoding rows that are not cached."""
        keys = [row.numpy().tobytes() for row in input_ids]  # content of a row; tensors hash by identity
        for i, key in enumerate(keys):
            if key not in self.rows:
                self.rows[key] = self.model.encode_prompts(input_ids[i : i + 1])
        rows = [self.rows[key] for key in keys]
        pooled = [row.pooled_prompt_embeds for row in rows if row.pooled_prompt_embeds is not None]
        return Conditioning(
            torch.cat([row.encoder_hidden_states for row in rows]), torch.cat(pooled) if pooled else None
        )


def enable_gradient_checkpointing(model: DiffusionModel) -> None:
    """Enable gradient checkpointing in the denoiser and in the text encoders that are trained."""
    # The denoiser even where it is frozen: gradients of a token pass through it.
    model.denoiser.enable_gradient_checkpointing()
    for encoder in model.text_encoders.values():
        if any(p.requires_grad for p in encoder.parameters()):
            # Reentrant checkpointing needs an input that requires gradients, which token ids can't.
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
