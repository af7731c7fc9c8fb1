"""The base of callbacks that act after whole optimizer steps."""

from typing import Any

import pytorch_lightning as pl

from tasks.training.module import DreamBoothModule


class StepCallback(pl.Callback):
    """Calls `on_step_end` after an optimizer step, not after each forward that is accumulated into it."""

    def on_train_batch_end(  # noqa: PLR0917 - Lightning's hook
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call `on_step_end` after the last micro-batch of a step."""
        # By batch index, not `global_step`: the data loader never ends, so accumulation never stops early.
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, as_dreambooth(pl_module))

    def on_step_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Act after a step; `module.step` includes it."""


def as_dreambooth(pl_module: pl.LightningModule) -> DreamBoothModule:
    """Narrow the type: Lightning's hooks are declared with the base class."""
    assert isinstance(pl_module, DreamBoothModule)
    return pl_module


def is_last_step(module: DreamBoothModule) -> bool:
    """Whether this is the last planned step."""
    return module.step >= module.spec.training.max_train_steps


def is_due(step: int, every: int) -> bool:
    """Whether a periodic action is due at a step; a period of 0 means never."""
    return every > 0 and step % every == 0
