"""Start child processes that end with this one."""

import atexit
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tasks.stage.guard import LIFELINE, has_parent

SOURCE_ROOT = Path(__file__).resolve().parent.parent.parent
GUARD = "tasks.stage.guard"
LIFELINE_PREFIX, LIFELINE_NAME = "likeness-", "lifeline"
OPENING = threading.Lock()


def guarded(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module and ends with this process."""
    return [sys.executable, "-m", GUARD, module, *arguments]


def share_cores() -> None:
    """Let OpenMP's threads sleep while they wait for each other; to be called before torch is imported.

    They spin by default: where another process takes one of two cores, a forward pass took 15 times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def child_environment(**changes: str) -> dict[str, str]:
    """Return this process's environment, with the lifeline and the import path that a guarded child needs."""
    with OPENING:  # lru_cache alone would let two threads create a FIFO each, of which one is never closed
        lifeline = open_lifeline()
    paths: Sequence[str] = [str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONSAFEPATH": "1",  # keeps the working directory, which may hold a folder named `tasks`, off sys.path
        LIFELINE: lifeline,
        **changes,
    }


@lru_cache(maxsize=1)
def open_lifeline() -> str:
    """Create this process's FIFO and hold its write end open until the process ends; return its path.

    A FIFO rather than a pipe, since torchrun starts the ranks without passing on descriptors.
    """
    remove_stale_lifelines(Path(tempfile.gettempdir()))
    folder = tempfile.mkdtemp(prefix=LIFELINE_PREFIX)
    path, opening = os.path.join(folder, LIFELINE_NAME), os.path.join(folder, "opening")
    os.mkfifo(opening, 0o600)
    # O_RDWR, since opening for writing alone blocks until there is a reader. O_CLOEXEC, since a child that inherited
    # the descriptor would keep its own lifeline open. It is never closed explicitly: process exit closes it.
    os.open(opening, os.O_RDWR | os.O_CLOEXEC)
    os.rename(opening, path)  # under its name it always has a writer, unless its process is gone
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return path


def remove_stale_lifelines(folder: Path) -> None:
    """Remove the FIFOs of processes that were killed, which no exit handler removes."""
    for path in folder.glob(f"{LIFELINE_PREFIX}*/{LIFELINE_NAME}"):
        try:
            # Only what `open_lifeline` makes: names in a shared folder are anybody's.
            found, names = path.lstat(), sorted(os.listdir(path.parent))
            if not stat.S_ISFIFO(found.st_mode) or found.st_uid != os.getuid() or names != [LIFELINE_NAME]:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:  # another user's, or just removed
            continue
        try:
            is_stale = not has_parent(descriptor)
        finally:
            os.close(descriptor)
        if is_stale:
            shutil.rmtree(path.parent, ignore_errors=True)
