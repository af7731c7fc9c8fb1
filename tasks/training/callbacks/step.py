"""The base of callbacks that act after whole optimizer steps."""

from typing import Any

import pytorch_lightning as pl

from tasks.training.module import DreamBoothModule


class StepCallback(pl.Callback):
    """Calls `on_step_end` after an optimizer step, not after each forward that is accumulated into it."""

    def on_train_batch_end(  # noqa: PLR0917 - Lightning's hook
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Skip the forwards of an unfinished step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, as_dreambooth(pl_module))

    def on_step_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Act; the module's `step` counts this step already."""


def as_dreambooth(pl_module: pl.LightningModule) -> DreamBoothModule:
    """Return the module by its own type; Lightning's hooks know only the base class."""
    assert isinstance(pl_module, DreamBoothModule)
    return pl_module


def is_last_step(module: DreamBoothModule) -> bool:
    """Whether no step follows by plan."""
    return module.step >= module.spec.training.max_train_steps


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens at this one; 0 means never."""
    return every > 0 and step % every == 0
