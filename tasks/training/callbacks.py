"""What happens around steps: loss log, checkpoints, the stop file, the watch on the parent."""

import json
import os
import threading
import time
from typing import Any

import pytorch_lightning as pl
import torch

from tasks.errors import TrainingFailed
from tasks.training.checkpoints import collect_state, save_checkpoint
from tasks.training.module import DreamBoothModule
from tasks.training.spec import RunFolder, TrainingSpec


class StepKeeper(pl.Callback):
    """Logs losses, saves checkpoints and stops when asked, always at an optimizer step."""

    def __init__(self, spec: TrainingSpec, run: RunFolder, *, losses: list[str]) -> None:
        self.spec = spec
        self.run = run
        self.losses = losses
        self.pending: list[dict[str, Any]] = []
        self.micro: list[dict[str, torch.Tensor]] = []
        self.was_stopped = False
        self.saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the loss log as the checkpoint knows it and start the clock."""
        self.started = self.ticked = time.monotonic()
        if trainer.is_global_zero:
            self.run.losses.write_text("".join(line + "\n" for line in self.losses))
            self.tell({"event": "started", "step": self.module(pl_module).step})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act after a micro-batch; all but the bookkeeping waits for a full optimizer step."""
        self.micro.append({key: value.detach() for key, value in outputs.items()})
        if len(self.micro) < self.spec.training.gradient_accumulation_steps:
            return
        module = self.module(pl_module)
        means = {key: torch.stack([row[key] for row in self.micro]).mean() for key in self.micro[0]}
        self.pending.append({"step": module.step, **means, "grad_norm": module.grad_norm})
        self.micro = []
        config = self.spec.training
        is_last = module.step >= config.max_train_steps
        if is_last or module.step % config.log_every_steps == 0:
            self.flush(trainer)
        is_stop = bool(trainer.strategy.reduce_boolean_decision(self.run.stop.exists(), all=False))
        if is_stop or is_last or module.step % config.checkpoint_every_steps == 0:
            self.save(trainer, module)
        if is_stop and not is_last:
            self.was_stopped = True
            trainer.should_stop = True

    def flush(self, trainer: pl.Trainer) -> None:
        """Bring the pending losses to the host, check them, and log one line per step."""
        now = time.monotonic()
        for row in self.pending:
            plain = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
            if not all(map(torch.isfinite, map(torch.tensor, plain.values()))):
                raise TrainingFailed(
                    f"loss or gradient is not finite at step {plain['step']}; lower training.learning_rate"
                )
            self.losses.append(json.dumps(plain))
        if trainer.is_global_zero and self.pending:
            with self.run.losses.open("a") as file:
                file.write("".join(line + "\n" for line in self.losses[-len(self.pending) :]))
            last = json.loads(self.losses[-1])
            config = self.spec.training
            halves = 2 if config.prior_loss_weight > 0 else 1
            per_step = config.train_batch_size * config.gradient_accumulation_steps * config.num_devices * halves
            rate = per_step * len(self.pending) / max(1e-9, now - self.ticked)
            self.tell({"event": "step", **last, "images_per_second": round(rate, 2)})
        self.pending = []
        self.ticked = now

    def save(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Save once per step; every rank waits until the first one has written."""
        self.flush(trainer)
        if self.saved_step == module.step:
            return
        self.saved_step = module.step
        if trainer.is_global_zero:
            state = collect_state(module.trained, module.optimizer, step=module.step, losses=self.losses)
            save_checkpoint(
                self.run.checkpoints,
                state,
                identity=self.spec.identity(),
                num_kept=self.spec.training.num_checkpoints_kept,
            )
            self.tell({"event": "checkpoint", "step": module.step})
        trainer.strategy.barrier()
        self.ticked = time.monotonic()

    def tell(self, event: dict[str, Any]) -> None:
        """Append one event for the supervisor."""
        with self.run.events.open("a") as file:
            file.write(json.dumps(event) + "\n")

    @staticmethod
    def module(pl_module: pl.LightningModule) -> DreamBoothModule:
        """Return the module by its own type."""
        assert isinstance(pl_module, DreamBoothModule)
        return pl_module


def watch_supervisor(pid: int) -> None:
    """End this process soon after the supervisor is gone, so that no orphan holds the device."""

    def watch() -> None:
        while True:
            time.sleep(1.0)
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                os._exit(76)

    threading.Thread(target=watch, name="watch-supervisor", daemon=True).start()
