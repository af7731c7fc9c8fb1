"""What happens around steps: loss log, checkpoints, the stop file."""

import json
import logging
import math
import time
from typing import Any

import pytorch_lightning as pl
import torch

from tasks.errors import TrainingFailed
from tasks.stage.digests import dump_line
from tasks.stage.files import explain_full_disk
from tasks.training.callbacks.best_checkpoints import is_candidate, keep_candidate
from tasks.training.callbacks.similarity import SimilarityMeter
from tasks.training.callbacks.validation import compute_validation_loss, draw_samples, has_converged, join_grid
from tasks.training.checkpoint_io import TrainingState, collect_state, copy_all, save_checkpoint
from tasks.training.module import DreamBoothModule
from tasks.training.process.worker_spec import RunFolder, TrainingSpec

log = logging.getLogger(__name__)
LOOK_SECONDS = 2.0


class TrainingCallbacks(pl.Callback):
    """Logs losses, saves checkpoints and stops when asked, always at an optimizer step."""

    def __init__(
        self, spec: TrainingSpec, run: RunFolder, *, fingerprint: dict[str, str], state: TrainingState | None
    ) -> None:
        self.spec = spec
        self.run = run
        self.fingerprint = fingerprint
        self.losses = list(state.losses) if state else []
        self.scaler = state.scaler if state else {}
        self.pending: list[dict[str, Any]] = []
        self.micro: list[dict[str, torch.Tensor]] = []
        self.validations: dict[int, dict[str, torch.Tensor]] = {}
        self.meter: SimilarityMeter | None = None
        self.num_skipped = count_skipped(self.losses)
        self.was_stopped = False
        self.steps_between_looks = 1
        self.saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the loss log as the checkpoint knows it and start the clock."""
        self.ticked = time.monotonic()
        steps = torch.tensor(float(self.module(pl_module).step))
        if float(trainer.strategy.reduce(steps.to(pl_module.device), reduce_op="mean")) != steps:
            raise TrainingFailed("ranks found different checkpoints; is the run folder the same for all of them?")
        if self.scaler:
            trainer.precision_plugin.load_state_dict(self.scaler)
        if trainer.is_global_zero:
            self.run.losses.write_text("".join(line + "\n" for line in self.losses))
            emit_event(self.run, {"event": "started", "step": self.module(pl_module).step})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act after a micro-batch; all but the bookkeeping waits for a full optimizer step."""
        self.run.alive(trainer.global_rank).touch()
        self.micro.append({key: value.detach() for key, value in outputs.items()})
        if len(self.micro) < self.spec.training.gradient_accumulation_steps:
            return
        module = self.module(pl_module)
        module.update_average()
        means = {key: torch.stack([row[key] for row in self.micro]).mean() for key in self.micro[0]}
        means["loss"] = means.pop("total_loss")
        self.pending.append({"step": module.step, **means, "grad_norm": module.grad_norm})
        self.micro = []
        config, validation = self.spec.training, self.spec.training.validation
        is_last = module.step >= config.max_train_steps
        is_validated = bool(validation.validation_steps) and module.step % validation.validation_steps == 0
        if is_validated:
            with trainer.precision_plugin.forward_context(), module.averaged():
                self.validations[module.step] = self.validate(module)
        if is_last or is_validated or module.step % config.log_every_n_steps == 0:
            self.flush(trainer)
        if is_validated and validation.keep == "best":
            self.keep_candidate(trainer, module)
        if is_validated and validation.early_stopping:
            has_settled_here = has_converged(self.losses, validation)
            if trainer.strategy.reduce_boolean_decision(has_settled_here, all=False):
                is_last = trainer.should_stop = True
        if validation.sample_steps and module.step % validation.sample_steps == 0:
            self.draw_samples(trainer, module)
        is_stop = self.is_asked_to_stop(trainer, module)
        if is_stop or is_last or module.step % config.checkpointing_steps == 0:
            self.save(trainer, module)
        if is_stop and not is_last:
            self.was_stopped = True
            trainer.should_stop = True

    def validate(self, module: DreamBoothModule) -> dict[str, torch.Tensor]:
        """Return what the weights as they are reach, by name in the loss log."""
        found = {"validation_loss": compute_validation_loss(module)}
        if self.spec.training.validation.metric == "similarity":
            self.meter = self.meter or SimilarityMeter(self.spec, module.device)
            found["validation_similarity"] = self.meter.measure(module)
        return found

    def keep_candidate(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Save what is trained if it is among the best yet; ranks agree, since they may have to unshard it."""
        is_good = is_candidate(self.losses, self.spec.training.validation)
        if not trainer.strategy.reduce_boolean_decision(is_good, all=False):
            return
        if trainer.is_global_zero or module.fsdp:
            weights = copy_all(module.ema or dict(module.named_trained()), is_kept=trainer.is_global_zero)
        if trainer.is_global_zero:
            keep_candidate(self.run, self.spec, weights, self.losses, fingerprint=self.fingerprint)

    def is_asked_to_stop(self, trainer: pl.Trainer, module: DreamBoothModule) -> bool:
        """Whether the stop file is there; several ranks look every few seconds, since to agree they wait."""
        if trainer.world_size > 1 and module.step % self.steps_between_looks:
            return False
        return bool(trainer.strategy.reduce_boolean_decision(self.run.stop.exists(), all=False))

    def flush(self, trainer: pl.Trainer) -> None:
        """Bring the pending losses to the host, check them, and log one line per step."""
        now = time.monotonic()
        if self.pending:
            seconds = torch.tensor((now - self.ticked) / len(self.pending), device=trainer.strategy.root_device)
            mean = float(trainer.strategy.reduce(seconds, reduce_op="mean"))  # so that all ranks look at once
            self.steps_between_looks = max(1, int(LOOK_SECONDS / max(mean, 1e-9)))
        for row in self.unshard(trainer):
            self.losses.append(json.dumps(self.check(row)))
        if trainer.is_global_zero and self.pending:
            with explain_full_disk(self.run.losses), self.run.losses.open("a") as file:
                file.write("".join(line + "\n" for line in self.losses[-len(self.pending) :]))
            last = json.loads(self.losses[-1])
            config = self.spec.training
            halves = 2 if config.prior_loss_weight > 0 else 1
            per_step = config.train_batch_size * config.gradient_accumulation_steps * config.world_size * halves
            rate = per_step * len(self.pending) / max(1e-9, now - self.ticked)
            emit_event(self.run, {"event": "step", **last, "images_per_second": round(rate, 2)})
        self.pending = []
        self.ticked = now

    def unshard(self, trainer: pl.Trainer) -> list[dict[str, float]]:
        """Bring the pending rows to the host, as means over all ranks: one transfer, one exchange."""
        if not self.pending:
            return []
        names = [name for name in self.pending[0] if name != "step"]
        rows = torch.stack([torch.stack([row[name].float() for name in names]) for row in self.pending])
        if trainer.world_size > 1:
            rows = trainer.strategy.reduce(rows, reduce_op="mean")
        numbers = []
        for row, values in zip(self.pending, rows.tolist(), strict=True):
            plain = {"step": row["step"], **dict(zip(names, values, strict=True))}
            if row["step"] in self.validations:
                plain |= {name: value.item() for name, value in self.validations.pop(row["step"]).items()}
            numbers.append(plain)
        return numbers

    def check(self, plain: dict[str, float]) -> dict[str, Any]:
        """Return a row of the loss log, None where a number isn't finite: such a step was left out.

        Raises:
            TrainingFailed: too many steps in a row were left out, or the first one changed nothing.

        """
        step, config = int(plain["step"]), self.spec.training
        if plain["grad_norm"] == 0.0 and not self.losses and config.proportion_empty_prompts == 0:
            raise TrainingFailed("the first step changed nothing: no gradient reaches what is trained")
        is_whole = all(math.isfinite(value) for name, value in plain.items() if "validation" not in name)
        self.num_skipped = 0 if is_whole else self.num_skipped + 1
        # In fp16 the scaler begins too high on purpose and finds its place by leaving steps out.
        limit = max(config.max_skipped_steps, 20 if config.mixed_precision == "fp16" else 0)
        if self.num_skipped > limit:
            size = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
            raise TrainingFailed(
                f"loss or gradient was not finite in {self.num_skipped} steps up to step {step} "
                f"(samples {(step - self.num_skipped) * size} to {step * size - 1}); "
                "lower the learning rate, or train in fp32"
            )
        if not is_whole:
            log.warning("step %s was left out: loss or gradient is not finite", step)
        return {key: value if math.isfinite(value) else None for key, value in plain.items()}

    def draw_samples(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Draw a grid between two steps; training goes on from the same weights."""
        rows = draw_samples(module) if trainer.is_global_zero or module.fsdp else []
        if trainer.is_global_zero:
            self.run.samples.mkdir(exist_ok=True)
            with explain_full_disk(self.run.samples):
                join_grid(rows).save(self.run.samples / f"step-{module.step:08d}.png")
            emit_event(self.run, {"event": "samples", "step": module.step})
        trainer.strategy.barrier()

    def save(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Save once per step; every rank waits until the first one has written."""
        self.flush(trainer)
        if self.saved_step == module.step:
            return
        self.saved_step = module.step
        if trainer.is_global_zero or module.fsdp:
            state = collect_state(
                dict(module.named_trained()),
                module.optimizer,
                step=module.step,
                ema=module.ema,
                losses=self.losses,
                scaler=trainer.precision_plugin.state_dict(),
                is_writer=trainer.is_global_zero,
            )
        if trainer.is_global_zero:
            save_checkpoint(
                self.run.checkpoints,
                state,
                fingerprint=self.fingerprint,
                num_kept=self.spec.training.checkpoints_total_limit,
            )
            emit_event(self.run, {"event": "checkpoint", "step": module.step})
        trainer.strategy.barrier()
        self.ticked = time.monotonic()

    @staticmethod
    def module(pl_module: pl.LightningModule) -> DreamBoothModule:
        """Return the module by its own type."""
        assert isinstance(pl_module, DreamBoothModule)
        return pl_module


def emit_event(run: RunFolder, event: dict[str, Any]) -> None:
    """Append one event for the supervisor. Raises StorageFull."""
    with explain_full_disk(run.events), run.events.open("a") as file:
        file.write(dump_line(event))


def count_skipped(losses: list[str]) -> int:
    """Return how many of the last steps were left out."""
    num = 0
    for line in reversed(losses):
        row = json.loads(line)
        if all(value is not None for name, value in row.items() if "validation" not in name):
            break
        num += 1
    return num
