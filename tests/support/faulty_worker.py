"""The training worker with one planned fault: LIKENESS_TEST_FAULT=POINT:STEP[:RANK].

`start:0` ends it before anything is loaded, `forward:8` in the forward of step 8; `save:10` with the
checkpoint of step 10 written but not yet in its place; `drop:15` with that of step 15 in its place and
older ones not yet dropped: all by SIGKILL. `stop:8` halts it for ever, `raise:8` raises.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from tasks.training import checkpoint_io as checkpoints
from tasks.training.callbacks import checkpoint as callbacks
from tasks.training.module import DreamBoothModule
from tasks.training.process import worker


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def plan(point: str, step: int) -> None:
    """Put the death where the fault says."""
    target = f"step-{step:08d}"
    forward, replace, listing = DreamBoothModule.training_step, os.replace, checkpoints.list_checkpoints

    def dying_forward(module: DreamBoothModule, *args: Any) -> Any:
        if module.step + 1 == step:
            die()
        return forward(module, *args)

    def dying_replace(source: Path, place: Path) -> None:
        if Path(place).name == target:
            die()
        replace(source, place)

    def dying_listing(folder: Path) -> list[Path]:
        if (folder / target).exists():
            die()
        return listing(folder)

    def halting_forward(module: DreamBoothModule, *args: Any) -> Any:
        if module.step + 1 == step:
            os.kill(os.getpid(), signal.SIGSTOP)
        return forward(module, *args)

    def raising_forward(module: DreamBoothModule, *args: Any) -> Any:
        if module.step + 1 == step:
            raise ValueError("planned fault")
        return forward(module, *args)

    if point == "start":
        die()
    elif point == "stop":
        DreamBoothModule.training_step = halting_forward  # type: ignore[assignment]
    elif point == "raise":
        DreamBoothModule.training_step = raising_forward  # type: ignore[assignment]
    elif point == "forward":
        DreamBoothModule.training_step = dying_forward  # type: ignore[assignment]
    elif point == "save":
        os.replace = dying_replace  # type: ignore[assignment]
    elif point == "drop":
        checkpoints.list_checkpoints = dying_listing
    else:
        raise ValueError(point)


if __name__ == "__main__":
    assert callbacks.save_checkpoint is checkpoints.save_checkpoint
    fault = os.environ.get("LIKENESS_TEST_FAULT")
    if fault:
        point, step, *rank = fault.split(":")
        if os.environ.get("RANK", "0") == (rank[0] if rank else "0"):
            plan(point, int(step))
    sys.exit(worker.main(sys.argv[1:]))
