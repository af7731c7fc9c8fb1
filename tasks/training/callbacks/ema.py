"""Exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from torch import Tensor

from tasks.training.callbacks.step import StepCallback, as_dreambooth
from tasks.training.module import DreamBoothModule


class Ema(StepCallback):
    """Keeps the EMA by parameter name, in the parameters' dtype and sharding; empty where `ema_decay` is 0."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from the current weights, unless `Resume` has restored an average."""
        if self.decay and not self.weights:
            self.weights = {name: p.detach().clone() for name, p in as_dreambooth(pl_module).named_trained()}

    @torch.no_grad()
    def on_step_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Update the average, with a lower decay in the first steps."""
        if not self.weights:
            return
        # Warm-up of the decay, without which the average would stay near the initial weights in short runs.
        decay = min(self.decay, (1 + module.step) / (10 + module.step))
        for name, parameter in module.named_trained():
            # ema <- decay * ema + (1 - decay) * p
            self.weights[name] = self.weights[name].to(parameter).lerp_(parameter, 1 - decay)

    def published(self, module: DreamBoothModule) -> dict[str, Tensor]:
        """Return the weights to publish: the average where one is kept, else the trained weights."""
        # References, not copies: callers copy them to the CPU before the next step.
        return self.weights or dict(module.named_trained())

    @torch.no_grad()
    def copy_to(self, module: DreamBoothModule) -> None:
        """Overwrite the trained weights with the average, where one is kept."""
        for name, parameter in module.named_trained():
            if name in self.weights:
                parameter.copy_(self.weights[name])

    @contextmanager
    def applied(self, module: DreamBoothModule) -> Iterator[None]:
        """Swap in the average, and restore the trained weights on exit."""
        # A copy of the trained weights, not a swap of tensors: the optimizer refers to the parameters themselves.
        trained = {name: p.detach().clone() for name, p in module.named_trained()} if self.weights else {}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in module.named_trained():
                    if name in trained:
                        parameter.copy_(trained[name])
