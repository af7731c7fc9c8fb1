"""Exact resume: checkpoints are restored before the first step and saved at optimizer steps."""

import pytorch_lightning as pl

from tasks.training.callbacks.ema import Ema
from tasks.training.callbacks.loss_log import LossLog
from tasks.training.callbacks.step import StepCallback, as_dreambooth, is_due, is_last_step
from tasks.training.checkpoint_io import LiveState, TrainingState, collect_state, restore_state, save_checkpoint
from tasks.training.module import DreamBoothModule
from tasks.training.process.worker_spec import RunFolder
from tasks.training.sharding import shard_like


class Resume(pl.Callback):
    """Restores a checkpoint once Lightning has moved the weights and built the optimizer; must precede `Ema`."""

    def __init__(self, state: TrainingState | None, ema: Ema) -> None:
        self.state = state
        self.ema = ema

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore weights, optimizer state, EMA and gradient scaler."""
        if self.state is not None:
            self.restore(as_dreambooth(pl_module))
            if self.state.scaler:
                # fp16 alone: loss scale and growth counter of the GradScaler.
                trainer.precision_plugin.load_state_dict(self.state.scaler)

    def restore(self, module: DreamBoothModule) -> None:
        """Restore all state that does not need a Trainer."""
        if self.state is None:
            return
        restore_state(dict(module.named_trained()), module.optimizer, self.state)
        for name, parameter in module.named_trained():
            if name in self.state.ema:
                # On the device and with the placements of its parameter, as `lerp_` needs them.
                self.ema.weights[name] = shard_like(self.state.ema[name], like=parameter)


class Checkpoints(StepCallback):
    """Saves every `checkpointing_steps`, at the last step and when training is stopped; must come last."""

    def __init__(self, run: RunFolder, loss_log: LossLog, ema: Ema, *, fingerprint: dict[str, str]) -> None:
        self.run = run
        self.loss_log = loss_log
        self.ema = ema
        self.fingerprint = fingerprint

    def on_step_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Save when due; all ranks wait until rank 0 has written."""
        # `should_stop` has been set by an earlier callback: early stopping, or a stop request.
        is_end = trainer.should_stop or is_last_step(module)
        if not (is_end or is_due(module.step, module.spec.training.checkpointing_steps)):
            return
        self.loss_log.flush(trainer)  # the checkpoint holds the loss log up to its step
        # Gathering sharded state is a collective; otherwise rank 0 has everything.
        if trainer.is_global_zero or module.is_sharded:
            live = LiveState(
                step=module.step,
                parameters=dict(module.named_trained()),
                optimizer=module.optimizer,
                ema=self.ema.weights,
                losses=self.loss_log.rows,
                scaler=trainer.precision_plugin.state_dict(),
            )
            state = collect_state(live, is_writer=trainer.is_global_zero)
        if trainer.is_global_zero:
            limit = module.spec.training.checkpoints_total_limit
            save_checkpoint(self.run.checkpoints, state, fingerprint=self.fingerprint, num_kept=limit)
            self.run.emit_event({"event": "checkpoint", "step": module.step})
        trainer.strategy.barrier()
        self.loss_log.restart_clock()  # saving is no training time
