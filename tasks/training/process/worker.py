"""The training process: started by the supervisor, once per device, never importing Prefect.

python -m tasks.training.process.worker SPEC.json
python -m torch.distributed.run --standalone --nproc-per-node 2 -m tasks.training.process.worker SPEC.json
"""

import contextlib
import gc
import logging
import os
import resource
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision, Precision
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.device import choose_device, describe_device
from tasks.diffusion.registry import find_family
from tasks.errors import ArtifactCorrupt, StorageFull, TrainingFailed
from tasks.manifests.training import LossRow, dump_losses
from tasks.redaction import clean_text, redact, shorten
from tasks.stage.digests import dump_signed, load_signed
from tasks.stage.files import explain_full_disk, write_atomic
from tasks.stage.tensor_files import explain_full_tensors
from tasks.training.callbacks.best_checkpoints import (
    BestCheckpoints,
    open_base,
    verify_candidates,
    write_candidate,
    write_weights,
)
from tasks.training.callbacks.checkpoint import Checkpoints, Resume
from tasks.training.callbacks.ema import Ema
from tasks.training.callbacks.loss_log import LossLog
from tasks.training.callbacks.samples import SampleGrids
from tasks.training.callbacks.stop import EarlyStopping, Heartbeat, StopRequest, has_converged
from tasks.training.callbacks.validation import Validation
from tasks.training.checkpoint_io import TrainingState, copy_all, load_newest
from tasks.training.data.datamodule import DreamBoothDataModule
from tasks.training.methods import save_learned
from tasks.training.module import DreamBoothModule
from tasks.training.optimizers import set_up_kernels
from tasks.training.process.checkpoint_files import step_of
from tasks.training.process.worker_spec import STOPPED_EXIT_CODE, RunFolder, TrainingSpec, WorkerFailure, WorkerResult
from tasks.training.sharding import init_process_group


def main(argv: list[str]) -> int:
    """Fine-tune per the spec and return the exit code. An exception is written to `failure.json`, then re-raised."""
    spec = read_spec(Path(argv[0]))
    try:
        set_up_process(spec)
        return train(spec)
    except Exception as error:
        report_failure(RunFolder(spec.path), error)
        raise


def report_failure(run: RunFolder, error: Exception) -> None:
    """Write why this rank failed. Only the first rank to fail is recorded: the others lose their connection to it."""
    failure = WorkerFailure(
        kind=type(error).__name__,
        message=shorten(clean_text(redact(str(error)), keep=" ").strip() or "no message", limit=1000),
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
    )
    # On a full disk the supervisor falls back to the exit code.
    with contextlib.suppress(OSError, StorageFull):
        staged = run.failure.with_suffix(f".{failure.rank}")
        write_atomic(staged, dump_signed(failure))
        try:
            # Unlike a rename, a hard link is atomic and refuses to replace an earlier rank's report.
            os.link(staged, run.failure)
        finally:
            staged.unlink()


def write_spec(path: Path, spec: TrainingSpec) -> None:
    """Write a spec for a worker to read."""
    write_atomic(path, dump_signed(spec, indent=1))


def read_spec(path: Path) -> TrainingSpec:
    """Return the spec after checking its digest. Raises ArtifactCorrupt."""
    try:
        return load_signed(TrainingSpec, path.read_bytes())
    except ArtifactCorrupt as error:
        raise ArtifactCorrupt(f"{path}: {error}; run again to write it again") from error


def count_cores() -> int:
    """Return how many threads OpenMP may use: all cores, unless its variable says fewer, as beside other runs."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else os.cpu_count() or 1


def set_up_process(spec: TrainingSpec) -> None:
    """Configure logging, threads, determinism and the CUDA device before anything is loaded."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Lightning warns about the missing logger and the worker-less data loader; both are intended.
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\..*")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks of one machine share its cores
    torch.set_num_threads(spec.training.num_threads or max(1, count_cores() // ranks))
    # cuBLAS is deterministic only with a fixed workspace, which it reads when the CUDA context is created.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(spec.training.deterministic)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def train(spec: TrainingSpec) -> int:
    """Train to the end. On out-of-memory, halve the micro-batch and keep the effective batch size.

    Raises:
        TrainingFailed: out of memory with an odd batch, or on several ranks.

    """
    # Taken before any halving: the micro-batch size is part of it, yet checkpoints stay valid across halvings.
    fingerprint = spec.fingerprint()
    while True:
        try:
            return attempt(spec, fingerprint)
        except torch.OutOfMemoryError as error:
            # Ranks run out of memory separately: one that halved alone would desynchronize the collectives.
            if spec.training.world_size > 1 or spec.training.train_batch_size % 2:
                raise TrainingFailed(
                    f"out of memory with {spec.training.train_batch_size} instance images at a time; lower "
                    "training.train_batch_size, or set training.gradient_checkpointing=true, "
                    "training.weight_dtype=bf16 or training/method=lora"
                ) from error
            spec = halve_batch(spec)
        # Outside the except block, whose traceback keeps the failed attempt's tensors alive. Trainer and module
        # reference each other, so only a collection frees them.
        gc.collect()
        torch.cuda.empty_cache()


def halve_batch(spec: TrainingSpec) -> TrainingSpec:
    """Return the spec with half the micro-batch and twice the accumulation: the same samples per optimizer step."""
    training = spec.training
    smaller = training.model_copy(
        update={
            "train_batch_size": training.train_batch_size // 2,
            "gradient_accumulation_steps": training.gradient_accumulation_steps * 2,
        }
    )
    RunFolder(spec.path).emit_event(
        {
            "event": "note",
            "text": f"out of memory: retrying with train_batch_size={smaller.train_batch_size}, "
            f"gradient_accumulation_steps={smaller.gradient_accumulation_steps}",
        },
    )
    return spec.model_copy(update={"training": smaller})


def attempt(spec: TrainingSpec, fingerprint: dict[str, str]) -> int:
    """Build model and callbacks, resume from the newest checkpoint, fit, and write the result; return the exit code."""
    run = RunFolder(spec.path)
    model = open_base(spec)
    state = load_newest(run.checkpoints, fingerprint=fingerprint)
    set_up_kernels(model, spec.training)
    module = DreamBoothModule(model, spec, start_step=state.step if state else 0)
    # After the module: placeholder tokens of textual inversion lengthen the captions.
    note_shortened_captions(run, spec, model)
    callbacks = Callbacks(spec, run, state, fingerprint=fingerprint)
    if callbacks.needs_training(module.start_step):
        fit(spec, module, callbacks.ordered)
        if callbacks.stop_request.was_stopped:
            run.emit_event({"event": "stopped", "step": module.step})
            return STOPPED_EXIT_CODE
    else:
        # All steps are done, but the process ended before it wrote the result. Without a Trainer the hooks that
        # Lightning would call are called here.
        if module.is_sharded:
            init_process_group(model.device)
        module.configure_model()
        module.configure_optimizers()
        callbacks.resume.restore(module)
    weights = None
    is_first_rank = int(os.environ.get("RANK", "0")) == 0
    if module.is_sharded:  # gathering DTensors is a collective: all ranks take part
        weights = copy_all(callbacks.ema.published(module), is_kept=is_first_rank)
    if is_first_rank:
        callbacks.ema.copy_to(module)
        write_result(run, module, callbacks.loss_log.rows, weights=weights, fingerprint=fingerprint)
    return 0


class Callbacks:
    """The callbacks of a run. Lightning calls them in list order, and the order matters."""

    def __init__(
        self, spec: TrainingSpec, run: RunFolder, state: TrainingState | None, *, fingerprint: dict[str, str]
    ) -> None:
        self.spec = spec
        self.ema = Ema(spec.training.ema_decay)
        self.loss_log = LossLog(spec, run, state.losses if state else ())
        self.resume = Resume(state, self.ema)
        self.stop_request = StopRequest(run)
        self.ordered: list[pl.Callback] = [
            Heartbeat(run),
            self.resume,  # restores the average, which Ema would else start from the weights
            self.ema,
            Validation(spec, self.loss_log, self.ema),  # adds to the row that the loss log then flushes
            self.loss_log,
            # These two read the flushed rows.
            BestCheckpoints(spec, run, self.loss_log, ema=self.ema, fingerprint=fingerprint),
            EarlyStopping(spec.training.validation, self.loss_log),
            SampleGrids(run),
            self.stop_request,
            # Last: it saves where one of the callbacks above has set `should_stop`.
            Checkpoints(run, self.loss_log, self.ema, fingerprint=fingerprint),
        ]

    def needs_training(self, start_step: int) -> bool:
        """Whether steps are left: neither all are done nor was training stopped early."""
        validation = self.spec.training.validation
        has_ended = validation.early_stopping and has_converged(self.loss_log.rows, validation)
        return start_step < self.spec.training.max_train_steps and not has_ended


def note_shortened_captions(run: RunFolder, spec: TrainingSpec, model: DiffusionModel) -> None:
    """Report captions that exceed a text encoder's context, and the shortened text that it receives."""
    for image in spec.instance_images if os.environ.get("RANK", "0") == "0" else ():
        for name, short in model.truncate_prompts(image.prompt).items():
            if short != image.prompt:
                text = f'{name} reads {model.max_length(name)} tokens of a caption: it gets "{short}"'
                run.emit_event({"event": "note", "text": text})


def fit(spec: TrainingSpec, module: DreamBoothModule, callbacks: list[pl.Callback]) -> None:
    """Train from the module's start step to the last, or until a stop is requested."""
    config = spec.training
    trainer = pl.Trainer(
        # A fresh Trainer counts from 0; the module adds `start_step`.
        max_steps=config.max_train_steps - module.start_step,
        max_epochs=-1,  # unlimited: the data set is endless
        accelerator=choose_device(spec.diffusion).type,
        devices=config.num_devices,
        num_nodes=config.num_nodes,
        strategy=choose_strategy(spec),
        plugins=choose_precision(spec),
        accumulate_grad_batches=config.gradient_accumulation_steps,
        use_distributed_sampler=False,  # order is a function of the sample counter
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,  # Lightning's own saving is neither atomic nor exact
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=DreamBoothDataModule(module.model, spec, start_step=module.start_step))
    if not module.is_sharded:  # whose weights are gathered
        # Lightning leaves them on the CPU; a saved adapter is tried where the model computes.
        module.to(module.model.device)


def choose_precision(spec: TrainingSpec) -> Precision:
    """Return the precision plugin. Selected by name, Lightning would replace fp16 by bf16 on a CPU."""
    names: dict[str, Any] = {"bf16": "bf16-mixed", "fp16": "16-mixed"}
    name = names.get(spec.training.mixed_precision)
    return MixedPrecision(name, choose_device(spec.diffusion).type) if name else Precision()


def choose_strategy(spec: TrainingSpec) -> Any:
    """Return the distributed strategy: none, FSDP2 (`fully_shard`), or DDP."""
    if spec.training.world_size == 1:
        return "auto"
    if spec.training.fsdp:
        return ModelParallelStrategy(data_parallel_size=spec.training.world_size, tensor_parallel_size=1)
    has_unused = find_family(spec.diffusion.family).has_unused_parameters
    # Gradients are views of the all-reduce buckets, which saves a copy of all gradients.
    return DDPStrategy(find_unused_parameters=has_unused, gradient_as_bucket_view=True)


def write_result(
    run: RunFolder,
    module: DreamBoothModule,
    losses: list[LossRow],
    *,
    weights: dict[str, torch.Tensor] | None,
    fingerprint: dict[str, str],
) -> None:
    """Write loss log and tuned model, then the manifest with their digests.

    `weights` are the gathered final weights of sharded training; None elsewhere.
    """
    spec = module.spec
    with explain_full_disk(run.losses):
        run.losses.write_text(dump_losses(losses))
    # Not `module.step`: where no step was left to train, the module has no Trainer.
    num_steps = losses[-1].step
    with explain_full_tensors(run.model, size_bytes=count_model_bytes(module)):
        published = write_best(run, spec, losses, fingerprint=fingerprint)
        if published is None and weights is not None:
            write_weights(weights, spec, run.model)
        elif published is None:
            save_learned(module.model, spec, module.trainable, folder=run.model)
    # A mean of several steps: the loss of one depends mostly on its timesteps.
    tail = [row.loss for row in losses[-20:] if row.loss is not None]
    # In KiB on Linux, in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    result = WorkerResult(
        num_steps=num_steps,
        published_step=num_steps if published is None else published,
        start_step=module.start_step,
        final_loss=sum(tail) / max(1, len(tail)),
        micro_batch_size=spec.training.train_batch_size,
        trainable_parameters=sum(parameter.numel() for _, parameter in module.named_trained()),
        total_parameters=sum(parameter.numel() for parameter in list_parameters(module)),
        peak_memory_bytes=int(peak),
        device=describe_device(spec.diffusion),
        files=run.digest_output(),
    )
    write_atomic(run.result, dump_signed(result, indent=1))


def write_best(run: RunFolder, spec: TrainingSpec, losses: list[LossRow], *, fingerprint: dict[str, str]) -> int | None:
    """Write the best retained weights as the model and the others as candidates.

    Returns the step of the best, None where none are retained.
    """
    # An earlier attempt may have left partial output.
    shutil.rmtree(run.model, ignore_errors=True)
    shutil.rmtree(run.candidates, ignore_errors=True)
    candidates, damaged = verify_candidates(run, losses, spec.training.validation, fingerprint=fingerprint)
    for path in damaged:
        text = f"the retained checkpoint of step {step_of(path)} is damaged and skipped; see {path}"
        run.emit_event({"event": "note", "text": text})
    for place, path in enumerate(candidates):
        folder = run.candidates / path.name if place else run.model
        write_candidate(path, spec, folder, fingerprint=fingerprint)
    return step_of(candidates[0]) if candidates else None


def list_parameters(module: DreamBoothModule) -> list[nn.Parameter]:
    """Return every parameter of the model."""
    return [p for part in module.model.components.values() if isinstance(part, nn.Module) for p in part.parameters()]


def count_model_bytes(module: DreamBoothModule) -> int:
    """Return the approximate size of the published model in bytes."""
    is_whole = module.spec.training.method.endswith("full")
    trained = [parameter for _, parameter in module.named_trained()]
    return sum(parameter.nbytes for parameter in (list_parameters(module) if is_whole else trained))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
