"""Train, interrupt and resume at full size, and compare every bit: python -m tests.bench.resume [--model mini|sd15].

For each set of options: one run without interruption, and one that is stopped and resumed. Both write equal files, or
the row says which differ.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tasks.training.process.supervisor import run_worker
from tasks.training.process.worker_spec import RunFolder, TrainingSpec
from tests.bench.training import Case, make_model, open_folder

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"method": "lora"},
    "full, EMA, gradient checkpointing": {"ema_decay": 0.99, "gradient_checkpointing": True},
}
GPU_OPTIONS: dict[str, dict[str, Any]] = {
    "full, compiled, channels last": {"compile": True, "channels_last": True},
    "full, fp16": {"mixed_precision": "fp16"},
    "full, 8-bit AdamW": {"optimizer": "adamw8bit"},
}


def train(spec: TrainingSpec, *, stop_at: int | None = None) -> dict[str, str]:
    """Train to the end, after an interruption at a step, and return the digests of all that was written."""

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] >= stop_at:
            raise KeyboardInterrupt

    if stop_at is not None:
        try:
            run_worker(spec, on_event=interrupt)
        except KeyboardInterrupt:
            pass
        else:
            raise SystemExit("the run ended before it was interrupted: raise --steps")
    started = []
    run_worker(spec, on_event=lambda event: started.append(event["step"]) if event["event"] == "started" else None)
    if stop_at is not None and not 0 < started[0] < spec.training.max_train_steps:
        raise SystemExit(f"resumed from step {started[0]}: raise --steps")
    return RunFolder(spec.path).digest_output()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.resume", description=__doc__)
    parser.add_argument("--model", choices=("mini", "sd15"), default="sd15" if torch.cuda.is_available() else "mini")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", help="comma-separated positions in the table, from 0")
    parser.add_argument("--folder", type=Path, help="where the model is made, and found by the next bench")
    options = parser.parse_args()
    chosen = list({**OPTIONS, **(GPU_OPTIONS if torch.cuda.is_available() else {})}.items())
    if options.only:
        chosen = [chosen[int(index)] for index in options.only.split(",")]
    print("| options | steps | files that differ | seconds |\n|---|---|---|---|")
    with open_folder(options.folder) as place:
        case = Case(
            model=make_model(options.model, place),
            resolution=64 if options.model == "mini" else 512,
            batch_size=1,
            precision="bf16" if torch.cuda.is_available() else "fp32",
            folder=place,
        )
        case.draw_images()
        for label, changes in chosen:
            begun = time.monotonic()
            settings = {"deterministic": True, "log_every_n_steps": 2, **changes}
            found = []
            for half, stop_at in (("whole", None), ("resumed", options.steps // 3)):
                with tempfile.TemporaryDirectory() as folder:
                    spec = case.spec(Path(folder) / half, steps=options.steps, **settings)
                    found.append(train(spec, stop_at=stop_at))
            different = sorted(key for key in {*found[0], *found[1]} if found[0].get(key) != found[1].get(key))
            seconds = time.monotonic() - begun
            print(f"| {label} | {options.steps} | {', '.join(different) or 'none'} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
