"""The training process: started by the supervisor, once per device, never importing Prefect.

python -m tasks.training.process.worker SPEC.json
python -m torch.distributed.run --standalone --nproc-per-node 2 -m tasks.training.process.worker SPEC.json
"""

import contextlib
import gc
import json
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
from torch.utils.data import DataLoader

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.device import choose_device
from tasks.diffusion.registry import find_family
from tasks.errors import ArtifactCorrupt, LikenessError, StorageFull, TrainingFailed
from tasks.stage.digests import dump_signed, load_signed
from tasks.stage.files import explain_full_disk, write_atomic
from tasks.stage.tensor_files import explain_full_tensors
from tasks.training.callbacks.best_checkpoints import (
    open_base,
    step_of,
    verify_candidates,
    write_candidate,
    write_weights,
)
from tasks.training.callbacks.steps import TrainingCallbacks, emit_event
from tasks.training.callbacks.validation import has_converged
from tasks.training.checkpoint_io import copy_all, load_newest, restore_state
from tasks.training.data.dataset import SampleCounter
from tasks.training.methods import save_learned
from tasks.training.module import DreamBoothModule
from tasks.training.optimizers import set_up_kernels
from tasks.training.process.worker_spec import STOPPED_EXIT_CODE, RunFolder, TrainingSpec, WorkerFailure, WorkerResult
from tasks.training.sharding import init_process_group, shard_like


def main(argv: list[str]) -> int:
    """Fine-tune as the spec says; return the exit code.

    Raises:
        LikenessError: also noted in `failure.json`, for the supervisor.

    """
    spec = read_spec(Path(argv[0]))
    set_up_process(spec)
    try:
        return train(spec)
    except LikenessError as error:
        failure = WorkerFailure(kind=type(error).__name__, message=str(error))
        with contextlib.suppress(OSError, StorageFull):  # then the log has to do
            write_atomic(RunFolder(spec.path).failure, dump_signed(failure))
        raise


def write_spec(path: Path, spec: TrainingSpec) -> None:
    """Write a spec for a worker to read."""
    write_atomic(path, dump_signed(spec, indent=1))


def read_spec(path: Path) -> TrainingSpec:
    """Return a verified spec. Raises ArtifactCorrupt."""
    try:
        return load_signed(TrainingSpec, path.read_bytes())
    except ArtifactCorrupt as error:
        raise ArtifactCorrupt(f"{path}: {error}; run again to write it anew") from error


def set_up_process(spec: TrainingSpec) -> None:
    """Set threads and determinism before anything is loaded."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Lightning advises on loggers and data loaders that this worker leaves out on purpose.
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\..*")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(spec.training.num_threads or max(1, (os.cpu_count() or 1) // ranks))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(spec.training.deterministic)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def train(spec: TrainingSpec) -> int:
    """Train to the end; out of memory, go on with half the images at a time and the same effective batch.

    Raises:
        TrainingFailed: one image at a time doesn't fit either.

    """
    fingerprint = spec.fingerprint()
    while True:
        try:
            return attempt(spec, fingerprint)
        except torch.OutOfMemoryError as error:
            if spec.training.world_size > 1 or spec.training.train_batch_size % 2:
                raise TrainingFailed(
                    f"out of memory with {spec.training.train_batch_size} instance images at a time; lower "
                    "training.train_batch_size, or set training.gradient_checkpointing=true, "
                    "training.weight_dtype=bf16 or training/method=lora"
                ) from error
            spec = halve_batch(spec)
        gc.collect()  # trainer and module hold each other, and the weights
        torch.cuda.empty_cache()


def halve_batch(spec: TrainingSpec) -> TrainingSpec:
    """Return the spec with half the images per forward and twice the forwards: the same samples per step."""
    training = spec.training
    smaller = training.model_copy(
        update={
            "train_batch_size": training.train_batch_size // 2,
            "gradient_accumulation_steps": training.gradient_accumulation_steps * 2,
        }
    )
    emit_event(
        RunFolder(spec.path),
        {
            "event": "note",
            "text": f"out of memory: going on with {smaller.train_batch_size} instance images at a time, "
            f"{smaller.gradient_accumulation_steps} times a step",
        },
    )
    return spec.model_copy(update={"training": smaller})


def attempt(spec: TrainingSpec, fingerprint: dict[str, str]) -> int:
    """Build everything, resume where a checkpoint is, fit, and write the result."""
    run = RunFolder(spec.path)
    model = open_base(spec)
    if spec.training.fsdp and spec.training.world_size > 1:
        init_process_group(model.device)
    state = load_newest(run.checkpoints, fingerprint=fingerprint)
    start_step = state.step if state else 0
    set_up_kernels(model, spec.training)
    module = DreamBoothModule(model, spec, start_step=start_step)
    if state is not None:
        restore_state(dict(module.named_trained()), module.optimizer, state)
        for name, parameter in module.named_trained():
            if name in state.ema:
                module.ema[name] = shard_like(state.ema[name], like=parameter)
    tell_shortened(run, spec, model)
    keeper = TrainingCallbacks(spec, run, fingerprint=fingerprint, state=state)
    has_stopped_early = spec.training.validation.early_stopping and has_converged(
        keeper.losses, spec.training.validation
    )
    if start_step < spec.training.max_train_steps and not has_stopped_early:
        fit(spec, module, keeper)
        if keeper.was_stopped:
            emit_event(run, {"event": "stopped", "step": module.step})
            return STOPPED_EXIT_CODE
    rank = int(os.environ.get("RANK", "0"))
    weights = None
    if module.fsdp:  # all ranks have to take part
        weights = copy_all(module.ema or dict(module.named_trained()), is_kept=rank == 0)
    if rank == 0:
        write_result(run, module, keeper.losses, weights=weights, fingerprint=fingerprint)
    return 0


def tell_shortened(run: RunFolder, spec: TrainingSpec, model: DiffusionModel) -> None:
    """Note which captions a text encoder doesn't read to their end, and what it gets instead."""
    for image in spec.instance_images if os.environ.get("RANK", "0") == "0" else ():
        for name, short in model.shorten(image.prompt).items():
            if short != image.prompt:
                text = f'{name} reads {model.max_length(name)} tokens of a caption: it gets "{short}"'
                emit_event(run, {"event": "note", "text": text})


def fit(spec: TrainingSpec, module: DreamBoothModule, keeper: TrainingCallbacks) -> None:
    """Train from the module's start step to the end, or until asked to stop."""
    config = spec.training
    trainer = pl.Trainer(
        max_steps=config.max_train_steps - module.start_step,
        max_epochs=-1,
        accelerator=choose_device(spec.diffusion).type,
        devices=config.num_devices,
        num_nodes=config.num_nodes,
        strategy=choose_strategy(spec),
        plugins=choose_precision(spec),
        accumulate_grad_batches=config.gradient_accumulation_steps,
        use_distributed_sampler=False,  # order is a function of the sample counter
        callbacks=[keeper],
        logger=False,
        enable_checkpointing=False,  # Lightning's own saving is neither atomic nor exact
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    counter = SampleCounter(spec, start_step=module.start_step, rank=trainer.global_rank, world_size=config.world_size)
    trainer.fit(module, DataLoader(counter, batch_size=None))


def choose_precision(spec: TrainingSpec) -> Precision:
    """Return how a step computes; by name Lightning would take bf16 for fp16 on a CPU."""
    names: dict[str, Any] = {"bf16": "bf16-mixed", "fp16": "16-mixed"}
    name = names.get(spec.training.mixed_precision)
    return MixedPrecision(name, choose_device(spec.diffusion).type) if name else Precision()


def choose_strategy(spec: TrainingSpec) -> Any:
    """Return how several devices share the work."""
    if spec.training.world_size == 1:
        return "auto"
    if spec.training.fsdp:
        return ModelParallelStrategy(data_parallel_size=spec.training.world_size, tensor_parallel_size=1)
    has_resting = find_family(spec.diffusion.family).has_unused_parameters
    return DDPStrategy(find_unused_parameters=has_resting, gradient_as_bucket_view=True)


def write_result(
    run: RunFolder,
    module: DreamBoothModule,
    losses: list[str],
    *,
    weights: dict[str, torch.Tensor] | None,
    fingerprint: dict[str, str],
) -> None:
    """Save loss log and tuned model, then the manifest that says that they are whole.

    `weights` are the last ones where the module itself has only its slices of them.
    """
    spec = module.spec
    with explain_full_disk(run.losses):
        run.losses.write_text("".join(line + "\n" for line in losses))
    num_steps = json.loads(losses[-1])["step"]
    with explain_full_tensors(run.model, size_bytes=count_model_bytes(module)):
        published = write_best(run, spec, losses, fingerprint=fingerprint)
        if published is None and weights is not None:
            write_weights(weights, spec, run.model)
        elif published is None:
            module.take_average()
            save_learned(module.model, spec, module.trainable, run.model)
    tail = [loss for line in losses[-20:] if (loss := json.loads(line)["loss"]) is not None]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
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
        files=run.digest_output(),
    )
    write_atomic(run.result, dump_signed(result, indent=1))


def write_best(run: RunFolder, spec: TrainingSpec, losses: list[str], *, fingerprint: dict[str, str]) -> int | None:
    """Write the best kept weights as the model, the others beside it; return the step, None where none are kept."""
    shutil.rmtree(run.model, ignore_errors=True)
    shutil.rmtree(run.candidates, ignore_errors=True)
    candidates, damaged = verify_candidates(run, losses, spec.training.validation, fingerprint=fingerprint)
    for path in damaged:
        text = f"kept weights of step {step_of(path)} are damaged and left out; see {path}"
        emit_event(run, {"event": "note", "text": text})
    for place, path in enumerate(candidates):
        folder = run.candidates / path.name if place else run.model
        write_candidate(path, spec, folder, fingerprint=fingerprint)
    return step_of(candidates[0]) if candidates else None


def list_parameters(module: DreamBoothModule) -> list[nn.Parameter]:
    """Return every parameter of the model."""
    return [p for part in module.model.components.values() if isinstance(part, nn.Module) for p in part.parameters()]


def count_model_bytes(module: DreamBoothModule) -> int:
    """Return about how large the published model is."""
    is_whole = module.spec.training.method.endswith("full")
    trained = [parameter for _, parameter in module.named_trained()]
    return sum(parameter.nbytes for parameter in (list_parameters(module) if is_whole else trained))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
