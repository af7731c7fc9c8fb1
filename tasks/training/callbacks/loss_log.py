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
    """A step whose numbers are still on the device: reading them would wait for it."""

    step: int
    values: dict[str, Tensor]


class LossLog(StepCallback):
    """Collects losses on the device and flushes them to the host, and to the file, now and then."""

    def __init__(self, spec: TrainingSpec, run: RunFolder, rows: Sequence[LossRow] = ()) -> None:
        self.config = spec.training
        self.run = run
        self.rows = list(rows)
        self.guard = NonFiniteGuard(spec.training, self.rows)
        self.pending: list[PendingRow] = []
        self.micro: list[dict[str, Tensor]] = []
        self.validations: dict[int, dict[str, Tensor]] = {}
        self.ticked = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the loss log as the checkpoint knows it and start the clock."""
        module = as_dreambooth(pl_module)
        self.restart_clock()
        step = torch.tensor(float(module.step))
        if float(trainer.strategy.reduce(step.to(module.device), reduce_op="mean")) != step:
            raise TrainingFailed("ranks found different checkpoints; is the run folder the same for all of them?")
        if trainer.is_global_zero:
            self.run.losses.write_text(dump_losses(self.rows))
            self.run.emit_event({"event": "started", "step": module.step})

    def on_train_batch_end(  # noqa: PLR0917 - Lightning's hook
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the losses of every forward."""
        self.micro.append({key: value.detach() for key, value in outputs.items()})
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Average the step's forwards; flush where it is due."""
        means = {key: torch.stack([row[key] for row in self.micro]).mean() for key in self.micro[0]}
        means["loss"] = means.pop("total_loss")
        self.micro = []
        self.pending.append(PendingRow(module.step, {**means, "grad_norm": module.grad_norm}))
        is_validated = module.step in self.validations
        if is_validated or is_last_step(module) or is_due(module.step, self.config.log_every_n_steps):
            self.flush(trainer)

    def add_validation(self, step: int, values: dict[str, Tensor]) -> None:
        """Add what was validated to the row of a step that is not flushed yet."""
        self.validations[step] = values

    def flush(self, trainer: pl.Trainer) -> None:
        """Bring the pending losses to the host, check them, and write one row per step.

        Raises:
            TrainingFailed: the losses show that training does not work.
            StorageFull: there is no room for the log.

        """
        now, new = time.monotonic(), self.collect(trainer)
        for row in new:
            self.rows.append(self.guard.check(row, is_first=not self.rows))
        if trainer.is_global_zero and new:
            written = self.rows[-len(new) :]
            with explain_full_disk(self.run.losses), self.run.losses.open("a") as file:
                file.write(dump_losses(written))
            rate = self.count_images_per_step() * len(new) / max(1e-9, now - self.ticked)
            values = written[-1].model_dump(exclude_unset=True)
            self.run.emit_event({"event": "step", **values, "images_per_second": round(rate, 2)})
        self.pending = []
        self.ticked = now

    def collect(self, trainer: pl.Trainer) -> list[LossRow]:
        """Return the pending rows as means over all ranks: one transfer, one exchange."""
        if not self.pending:
            return []
        names = list(self.pending[0].values)
        table = torch.stack([torch.stack([row.values[name].float() for name in names]) for row in self.pending])
        if trainer.world_size > 1:
            table = trainer.strategy.reduce(table, reduce_op="mean")
        rows = []
        for row, values in zip(self.pending, table.tolist(), strict=True):
            validated = {name: value.item() for name, value in self.validations.pop(row.step, {}).items()}
            rows.append(
                LossRow.model_validate({"step": row.step, **dict(zip(names, values, strict=True)), **validated})
            )
        return rows

    def count_images_per_step(self) -> int:
        """Return how many images of both halves one optimizer step sees, over all ranks."""
        config, halves = self.config, 2 if self.config.prior_loss_weight > 0 else 1
        return config.train_batch_size * config.gradient_accumulation_steps * config.world_size * halves

    def restart_clock(self) -> None:
        """Leave out of the next rate what was no training, such as saving."""
        self.ticked = time.monotonic()


class NonFiniteGuard:
    """Ends training that does not work: steps with a non-finite loss or gradient are skipped, but not for ever."""

    def __init__(self, config: TrainingConfig, rows: Sequence[LossRow]) -> None:
        self.config = config
        self.num_skipped = count_skipped(rows)
        # In fp16 the gradient scaler starts too high on purpose and settles by skipping steps.
        self.limit = max(config.max_skipped_steps, 20 if config.mixed_precision == "fp16" else 0)

    def check(self, row: LossRow, *, is_first: bool) -> LossRow:
        """Return the row with None for every number that is not finite: such a step was skipped.

        Raises:
            TrainingFailed: too many steps in a row were skipped, or the first one changed nothing.

        """
        config = self.config
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
