"""The training process: started by the supervisor, once per device, never importing Prefect.

python -m torch.distributed.run --standalone --nproc-per-node 1 -m tasks.training.worker SPEC.json
"""

import json
import logging
import os
import resource
import sys
import warnings
from pathlib import Path

import torch


def main(argv: list[str]) -> int:
    """Fine-tune as the spec says; return the exit code."""
    from tasks.training.spec import TrainingSpec

    spec = TrainingSpec.model_validate_json(Path(argv[0]).read_text())
    set_up_process(spec.training.num_threads, is_deterministic=spec.training.is_deterministic, seed=spec.seed)
    return train(spec)


def set_up_process(num_threads: int, *, is_deterministic: bool, seed: int) -> None:
    """Set threads, determinism and the supervisor's watch before anything is loaded."""
    from tasks.training.callbacks import watch_supervisor

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Lightning advises on loggers and data loaders that this worker leaves out on purpose.
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\..*")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(num_threads or max(1, (os.cpu_count() or 1) // ranks))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(is_deterministic)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Dropout, where a text encoder has any, is the one draw that torch's own generator makes.
    torch.manual_seed(seed + int(os.environ.get("RANK", "0")))
    supervisor = os.environ.get("LIKENESS_SUPERVISOR_PID")
    if supervisor:
        watch_supervisor(int(supervisor))


def train(spec: "TrainingSpec") -> int:  # type: ignore[name-defined]  # noqa: F821
    """Build everything, resume where a checkpoint is, fit, and write the result."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    from tasks.diffusion.base import open_model
    from tasks.training.callbacks import StepKeeper
    from tasks.training.checkpoints import load_newest, restore_state
    from tasks.training.data import SampleCounter
    from tasks.training.module import DreamBoothModule
    from tasks.training.spec import STOPPED_EXIT_CODE, RunFolder

    run = RunFolder(spec.path)
    model = open_model(spec.diffusion, folder=Path(spec.model_folder))
    state = load_newest(run.checkpoints, identity=spec.identity())
    start_step = state.step if state else 0
    module = DreamBoothModule(model, spec, start_step=start_step)
    optimizer = module.configure_optimizers()
    if state is not None:
        restore_state(module.trained, optimizer, state)
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    keeper = StepKeeper(spec, run, losses=state.losses if state else [])
    config = spec.training
    if start_step < config.max_train_steps:
        trainer = pl.Trainer(
            max_steps=config.max_train_steps - start_step,
            max_epochs=-1,
            accelerator="cpu" if spec.diffusion.device == "cpu" else "auto",
            devices=config.num_devices,
            strategy="auto" if config.num_devices == 1 else "ddp",
            precision="bf16-mixed" if config.precision == "bf16" else "32-true",
            accumulate_grad_batches=config.gradient_accumulation_steps,
            use_distributed_sampler=False,
            callbacks=[keeper],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        counter = SampleCounter(spec, start_step=start_step, rank=trainer.global_rank, world_size=config.num_devices)
        trainer.fit(module, DataLoader(counter, batch_size=None))
        if keeper.was_stopped:
            keeper.tell({"event": "stopped", "step": module.step})
            return STOPPED_EXIT_CODE
    if int(os.environ.get("RANK", "0")) == 0:
        write_result(run, module, model, losses=keeper.losses, start_step=start_step)
    return 0


def write_result(run, module, model, *, losses: list[str], start_step: int) -> None:  # type: ignore[no-untyped-def]
    """Save the tuned model, then the manifest that says that it is whole."""
    import shutil

    from tasks.contract import digest_file

    shutil.rmtree(run.model, ignore_errors=True)
    model.save(run.model)
    files = {
        str(path.relative_to(run.model)): digest_file(path) for path in sorted(run.model.rglob("*")) if path.is_file()
    }
    tail = [json.loads(line)["loss"] for line in losses[-20:]]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    result = {
        "num_steps": module.spec.training.max_train_steps,
        "start_step": start_step,
        "final_loss": sum(tail) / max(1, len(tail)),
        "trainable_parameters": sum(p.numel() for p in module.trained.parameters()),
        "peak_memory_bytes": int(peak),
        "files": files,
    }
    staged = run.result.with_suffix(".part")
    staged.write_text(json.dumps(result, indent=1))
    os.replace(staged, run.result)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
