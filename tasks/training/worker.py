"""The training process: started by the supervisor, once per device, never importing Prefect.

python -m torch.distributed.run --standalone --nproc-per-node 1 -m tasks.training.worker SPEC.json
"""

import json
import logging
import os
import resource
import shutil
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from tasks.contract import digest_file
from tasks.diffusion.base import DiffusionModel, choose_device, open_model
from tasks.training.callbacks import StepKeeper, watch_supervisor
from tasks.training.checkpoints import load_newest, restore_state
from tasks.training.data import SampleCounter
from tasks.training.module import DreamBoothModule
from tasks.training.spec import STOPPED_EXIT_CODE, RunFolder, TrainingSpec


def main(argv: list[str]) -> int:
    """Fine-tune as the spec says; return the exit code."""
    spec = TrainingSpec.model_validate_json(Path(argv[0]).read_text())
    set_up_process(spec)
    return train(spec)


def set_up_process(spec: TrainingSpec) -> None:
    """Set threads, determinism and the watch on the supervisor before anything is loaded."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Lightning advises on loggers and data loaders that this worker leaves out on purpose.
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\..*")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(spec.training.num_threads or max(1, (os.cpu_count() or 1) // ranks))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(spec.training.is_deterministic)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    supervisor = os.environ.get("LIKENESS_SUPERVISOR_PID")
    if supervisor:
        watch_supervisor(int(supervisor))


def train(spec: TrainingSpec) -> int:
    """Build everything, resume where a checkpoint is, fit, and write the result."""
    run = RunFolder(spec.path)
    model = open_model(spec.diffusion, folder=Path(spec.model_folder))
    state = load_newest(run.checkpoints, identity=spec.identity())
    start_step = state.step if state else 0
    module = DreamBoothModule(model, spec, start_step=start_step)
    if state is not None:
        restore_state(module.trained, module.optimizer, state)
    keeper = StepKeeper(spec, run, losses=state.losses if state else [])
    if start_step < spec.training.max_train_steps:
        fit(spec, module, keeper)
        if keeper.was_stopped:
            keeper.tell({"event": "stopped", "step": module.step})
            return STOPPED_EXIT_CODE
    if int(os.environ.get("RANK", "0")) == 0:
        write_result(run, module, model, keeper.losses)
    return 0


def fit(spec: TrainingSpec, module: DreamBoothModule, keeper: StepKeeper) -> None:
    """Train from the module's start step to the end, or until asked to stop."""
    config = spec.training
    trainer = pl.Trainer(
        max_steps=config.max_train_steps - module.start_step,
        max_epochs=-1,
        accelerator=choose_device(spec.diffusion).type,
        devices=config.num_devices,
        strategy="auto" if config.num_devices == 1 else "ddp",
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        accumulate_grad_batches=config.gradient_accumulation_steps,
        use_distributed_sampler=False,  # order is a function of the sample counter
        callbacks=[keeper],
        logger=False,
        enable_checkpointing=False,  # Lightning's own saving is neither atomic nor exact
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    counter = SampleCounter(spec, start_step=module.start_step, rank=trainer.global_rank, world_size=config.num_devices)
    trainer.fit(module, DataLoader(counter, batch_size=None))


def write_result(run: RunFolder, module: DreamBoothModule, model: DiffusionModel, losses: list[str]) -> None:
    """Save loss log and tuned model, then the manifest that says that they are whole."""
    run.losses.write_text("".join(line + "\n" for line in losses))
    shutil.rmtree(run.model, ignore_errors=True)
    model.save(run.model)
    paths = sorted(path for path in run.model.rglob("*") if path.is_file())
    tail = [json.loads(line)["loss"] for line in losses[-20:]]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    result = {
        "num_steps": module.spec.training.max_train_steps,
        "start_step": module.start_step,
        "final_loss": sum(tail) / len(tail),
        "trainable_parameters": sum(p.numel() for p in module.trained.parameters()),
        "peak_memory_bytes": int(peak),
        "files": {path.relative_to(run.model).as_posix(): digest_file(path) for path in paths},
    }
    staged = run.result.with_suffix(".part")
    staged.write_text(json.dumps(result, indent=1))
    os.replace(staged, run.result)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
