"""Early ends of training: a stop request of the supervisor, or a converged validation loss; and the heartbeat."""

import time
from collections.abc import Sequence
from statistics import pvariance
from typing import Any

import pytorch_lightning as pl
import torch

from tasks.manifests.training import LossRow
from tasks.training.callbacks.loss_log import LossLog
from tasks.training.callbacks.step import StepCallback, is_due, is_last_step
from tasks.training.config import ValidationSettings
from tasks.training.module import DreamBoothModule
from tasks.training.process.worker_spec import RunFolder

CHECK_SECONDS = 2.0


class Heartbeat(pl.Callback):
    """Touches a file after every forward; the supervisor kills all ranks where one stalls."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def on_train_batch_end(  # noqa: PLR0917 - Lightning's hook
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Touch this rank's file."""
        self.run.heartbeat(trainer.global_rank).touch()


class EarlyStopping(StepCallback):
    """Stops once the validation loss has converged."""

    def __init__(self, settings: ValidationSettings, loss_log: LossLog) -> None:
        self.settings = settings
        self.loss_log = loss_log

    def on_step_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Decide after every validation; all ranks stop at the same step."""
        if self.settings.early_stopping and is_due(module.step, self.settings.validation_steps):
            has_ended = has_converged(self.loss_log.rows, self.settings)
            if trainer.strategy.reduce_boolean_decision(has_ended, all=False):
                trainer.should_stop = True


class StopRequest(StepCallback):
    """Stops when the supervisor requests it; the run resumes from this step."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.was_stopped = False
        self.check_interval = 1  # until the step time is measured
        self.checked: tuple[int, float] | None = None

    def on_step_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Check for the stop file: each step on one rank, every `CHECK_SECONDS` on several."""
        # Agreement is an all-reduce that synchronizes the ranks, too costly at every step. The stop file itself is
        # seen by each rank at another time, so a local check would leave ranks waiting in a collective.
        if trainer.world_size > 1 and module.step % self.check_interval:
            return
        is_asked = bool(trainer.strategy.reduce_boolean_decision(self.run.stop.exists(), all=False))
        self.adjust_check_interval(trainer, module.step)
        # A run that ends anyway is complete, not stopped.
        if is_asked and not is_last_step(module) and not trainer.should_stop:
            self.was_stopped = trainer.should_stop = True

    def adjust_check_interval(self, trainer: pl.Trainer, step: int) -> None:
        """Adapt the number of steps between two checks to the mean step time, identically on all ranks."""
        if trainer.world_size == 1:
            return
        now = time.monotonic()
        if self.checked is not None and step > self.checked[0]:
            seconds = torch.tensor((now - self.checked[1]) / (step - self.checked[0]))
            # Reduced: with local step times, ranks would check at different steps and the all-reduce above would hang.
            mean = float(trainer.strategy.reduce(seconds.to(trainer.strategy.root_device), reduce_op="mean"))
            self.check_interval = max(1, int(CHECK_SECONDS / max(mean, 1e-9)))
        self.checked = (step, now)


def has_converged(rows: Sequence[LossRow], settings: ValidationSettings) -> bool:
    """Whether the variance of the last `window` losses is small against that of all (DVAR, arXiv 2302.04841)."""
    values = [row.validation_loss for row in rows if row.validation_loss is not None]
    # With fewer values, the window would dominate the total that it is compared with.
    if len(values) < 2 * settings.window:
        return False
    total = pvariance(values)
    # A constant loss has converged; no 0 / 0.
    return total == 0 or pvariance(values[-settings.window :]) / total < settings.threshold
