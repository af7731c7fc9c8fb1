"""The training worker with one planned death: LIKENESS_TEST_FAULT=POINT:STEP, SIGKILL at that point.

`forward:8` ends it in the forward of step 8; `save:10` with the checkpoint of step 10 written but not
yet in its place; `drop:15` with that of step 15 in its place and older ones not yet dropped.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from tasks.training import callbacks, checkpoints, worker
from tasks.training.module import DreamBoothModule


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

    if point == "forward":
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
        plan(fault.split(":")[0], int(fault.split(":")[1]))
    sys.exit(worker.main(sys.argv[1:]))
