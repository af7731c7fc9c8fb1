"""The loss log: one typed row per optimizer step, written to `losses.jsonl`."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from tasks.errors import TrainingFailed
from tasks.manifests.training import LossRow, count_skipped, dump_losses
from tasks.stage.files import explain_full_disk
from tasks.training.callbacks.step import StepCallback, as_dreambooth, is_due, is_last_step
from tasks.training.config import TrainingConfig
from tasks.training.module import DreamBoothModule
from tasks.training.process.worker_spec import RunFolder, TrainingSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingRow:
    """A step whose scalars are still on the device: reading them would synchronize with it."""

    step: int
    values: dict[str, Tensor]
    learning_rate: float


class LossLog(StepCallback):
    """Accumulates losses on the device and flushes them to host and file every `log_every_n_steps`."""

    def __init__(self, spec: TrainingSpec, run: RunFolder, rows: Sequence[LossRow] = ()) -> None:
        self.config = spec.training
        self.run = run
        self.rows = list(rows)
        self.guard = NonFiniteGuard(spec.training, self.rows)
        self.pending: list[PendingRow] = []
        self.micro_batch_losses: list[dict[str, Tensor]] = []
        self.validations: dict[int, dict[str, Tensor]] = {}
        self.last_flush_time = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rewrite the loss log up to the resumed step, check that ranks agree on it, and start the clock."""
        module = as_dreambooth(pl_module)
        self.restart_clock()
        # Ranks that resumed at different steps would train on inconsistent samples; the mean reveals them.
        step = torch.tensor(float(module.step))
        if float(trainer.strategy.reduce(step.to(module.device), reduce_op="mean")) != step:
            raise TrainingFailed("ranks found different checkpoints; is the run folder the same for all of them?")
        if trainer.is_global_zero:
            # Drops rows that were logged after the checkpoint: these steps are trained again.
            self.run.losses.write_text(dump_losses(self.rows))
            self.run.emit_event({"event": "started", "step": module.step})

    def on_train_batch_end(  # noqa: PLR0917 - Lightning's hook
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the losses of every micro-batch."""
        # Tensors stay on the device; `detach` frees the graph of the forward.
        self.micro_batch_losses.append({key: value.detach() for key, value in outputs.items()})
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Average over the step's micro-batches; flush when due."""
        means = {
            key: torch.stack([row[key] for row in self.micro_batch_losses]).mean() for key in self.micro_batch_losses[0]
        }
        # Lightning scales "loss" by the accumulation; "total_loss" is the unscaled value.
        means["loss"] = means.pop("total_loss")
        self.micro_batch_losses = []
        self.pending.append(PendingRow(module.step, {**means, "grad_norm": module.grad_norm}, module.learning_rate))
        is_validated = module.step in self.validations
        if is_validated or is_last_step(module) or is_due(module.step, self.config.log_every_n_steps):
            self.flush(trainer)

    def add_validation(self, step: int, values: dict[str, Tensor]) -> None:
        """Attach validation values to the row of a step that is not flushed yet."""
        self.validations[step] = values

    def flush(self, trainer: pl.Trainer) -> None:
        """Copy pending losses to the host, check them, and append one row per step to the file.

        Raises:
            TrainingFailed: too many non-finite steps in a row, or a first step without gradient.
            StorageFull: the disk is full.

        """
        now, new = time.monotonic(), self.collect(trainer)
        for row in new:
            # Rows are already reduced over ranks, so all ranks raise at the same step or none does.
            self.rows.append(self.guard.check(row, is_first=not self.rows))
        if trainer.is_global_zero and new:
            written = self.rows[-len(new) :]
            with explain_full_disk(self.run.losses), self.run.losses.open("a") as file:
                file.write(dump_losses(written))
            rate = self.count_images_per_step() * len(new) / max(1e-9, now - self.last_flush_time)
            # Unset means not measured; None, which is kept, means not finite.
            values = written[-1].model_dump(exclude_unset=True)
            self.run.emit_event({"event": "step", **values, "images_per_second": round(rate, 2)})
        self.pending = []
        self.last_flush_time = now

    def collect(self, trainer: pl.Trainer) -> list[LossRow]:
        """Return the pending rows averaged over ranks, with a single all-reduce and a single copy to the host."""
        if not self.pending:
            return []
        # The same for all rows: `prior_loss` is in each or in none, depending on `prior_loss_weight`.
        names = list(self.pending[0].values)
        # (pending steps, names), float32
        table = torch.stack([torch.stack([row.values[name].float() for name in names]) for row in self.pending])
        if trainer.world_size > 1:
            # NaN and infinity survive the mean, so a step that one rank skips counts as skipped on all.
            table = trainer.strategy.reduce(table, reduce_op="mean")
        rows = []
        for row, values in zip(self.pending, table.tolist(), strict=True):
            # Not reduced: every rank validates the same fixed photos.
            validated = {name: value.item() for name, value in self.validations.pop(row.step, {}).items()}
            measured = {**dict(zip(names, values, strict=True)), "learning_rate": row.learning_rate, **validated}
            rows.append(LossRow.model_validate({"step": row.step, **measured}))
        return rows

    def count_images_per_step(self) -> int:
        """Return the images per optimizer step over all ranks, instance and class images together."""
        config, halves = self.config, 2 if self.config.prior_loss_weight > 0 else 1
        return config.train_batch_size * config.gradient_accumulation_steps * config.world_size * halves

    def restart_clock(self) -> None:
        """Exclude time that was not spent on training, such as saving, from the next rate."""
        self.last_flush_time = time.monotonic()


class NonFiniteGuard:
    """Ends training after too many consecutive steps with a non-finite loss or gradient; such steps are skipped."""

    def __init__(self, config: TrainingConfig, rows: Sequence[LossRow]) -> None:
        self.config = config
        self.num_skipped = count_skipped(rows)  # a resumed run continues the count
        # The fp16 gradient scaler starts with a high scale by design and skips steps until it has backed off.
        self.limit = max(config.max_skipped_steps, 20 if config.mixed_precision == "fp16" else 0)

    def check(self, row: LossRow, *, is_first: bool) -> LossRow:
        """Return the row with non-finite values replaced by None, which marks a skipped step.

        Raises:
            TrainingFailed: too many consecutive steps were skipped, or the first had a gradient norm of 0.

        """
        config = self.config
        # With empty prompts a zero gradient can be legitimate: a learned token then may not occur in any prompt.
        if row.grad_norm == 0.0 and is_first and config.proportion_empty_prompts == 0:
            raise TrainingFailed("the first step changed nothing: no gradient reaches the trained parameters")
        values = row.model_dump(exclude_unset=True)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        checked = LossRow.model_validate(finite)
        self.num_skipped = self.num_skipped + 1 if checked.is_skipped else 0
        if self.num_skipped > self.limit:
            size = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
            raise TrainingFailed(
                f"loss or gradient was not finite in {self.num_skipped} steps up to step {row.step} "
                f"(samples {(row.step - self.num_skipped) * size} to {row.step * size - 1}); "
                "lower the learning rate, or train with mixed_precision=no"
            )
        if checked.is_skipped:
            log.warning("step %s was skipped: loss or gradient is not finite", row.step)
        return checked
