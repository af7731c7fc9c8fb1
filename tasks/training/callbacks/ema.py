"""Exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from torch import Tensor

from tasks.training.callbacks.step import StepCallback, as_dreambooth
from tasks.training.module import DreamBoothModule


class Ema(StepCallback):
    """Keeps averaged weights by parameter name; empty where `ema_decay` is 0."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the weights as they are, where no checkpoint brought an average."""
        if self.decay and not self.weights:
            self.weights = {name: p.detach().clone() for name, p in as_dreambooth(pl_module).named_trained()}

    @torch.no_grad()
    def on_step_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Move the average toward the weights, faster in the first steps."""
        if not self.weights:
            return
        decay = min(self.decay, (1 + module.step) / (10 + module.step))
        for name, parameter in module.named_trained():
            self.weights[name] = self.weights[name].to(parameter).lerp_(parameter, 1 - decay)

    def published(self, module: DreamBoothModule) -> dict[str, Tensor]:
        """Return the weights that are published: the average, or the trained ones where none is kept."""
        return self.weights or dict(module.named_trained())

    @torch.no_grad()
    def copy_to(self, module: DreamBoothModule) -> None:
        """Replace the trained weights by the average, where one is kept."""
        for name, parameter in module.named_trained():
            if name in self.weights:
                parameter.copy_(self.weights[name])

    @contextmanager
    def applied(self, module: DreamBoothModule) -> Iterator[None]:
        """Evaluate with the average, then go back to the trained weights."""
        trained = {name: p.detach().clone() for name, p in module.named_trained()} if self.weights else {}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in module.named_trained():
                    if name in trained:
                        parameter.copy_(trained[name])
