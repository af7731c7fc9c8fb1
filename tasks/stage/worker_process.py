"""Start child processes that can't outlive this one."""

import atexit
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tasks.stage.guard import LIFELINE

SOURCE_ROOT = Path(__file__).resolve().parent.parent.parent
GUARD = "tasks.stage.guard"
OPENING = threading.Lock()


def guarded(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module and ends with this process."""
    return [sys.executable, "-m", GUARD, module, *arguments]


def child_environment(**changes: str) -> dict[str, str]:
    """Return this process's environment with what a guarded child needs: the lifeline, and where the code lies."""
    with OPENING:
        lifeline = open_lifeline()
    paths: Sequence[str] = [str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONSAFEPATH": "1",  # a folder named tasks where a person happens to be is not imported
        LIFELINE: lifeline,
        **changes,
    }


@lru_cache(maxsize=1)
def open_lifeline() -> str:
    """Make this process's pipe and hold its writing end until the process ends; return its path.

    A pipe with a name, since ranks are started by a launcher that hands no descriptors on.
    """
    folder = tempfile.mkdtemp(prefix="likeness-")
    path = os.path.join(folder, "lifeline")
    os.mkfifo(path, 0o600)
    # Read and write, so that opening waits for nobody; children don't inherit it.
    os.open(path, os.O_RDWR | os.O_CLOEXEC)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return path
