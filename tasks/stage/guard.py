"""Run a module in a process that ends with the one that started it, from its first instruction on.

    python -m tasks.stage.guard MODULE [ARGUMENT ...]

The environment names a pipe whose writing end the parent holds. When the parent is gone, however it ended, reading
finds the pipe's end. A check of the parent's process id could only begin after the imports, which take ten seconds
on a loaded machine; this module imports nothing but the standard library.
"""

import os
import runpy
import select
import signal
import sys
import threading
import time

LIFELINE = "LIKENESS_LIFELINE"
ORPHANED_EXIT_CODE = 76
GRACE_SECONDS = 3.0


def has_parent(descriptor: int) -> bool:
    """Whether somebody holds the writing end."""
    try:
        return os.read(descriptor, 1) != b""
    except BlockingIOError:
        return True


def leave() -> None:
    """End politely, then at once."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(ORPHANED_EXIT_CODE)


def watch(descriptor: int) -> None:
    """Wait for the end of the pipe."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while has_parent(descriptor):
        poll.poll(1000)  # wakes at once when the last writer goes
    leave()


def main() -> None:
    """Watch the lifeline, then become the module."""
    path = os.environ.get(LIFELINE)
    if path:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            os._exit(ORPHANED_EXIT_CODE)
        if not has_parent(descriptor):
            os._exit(ORPHANED_EXIT_CODE)
        threading.Thread(target=watch, args=(descriptor,), name="lifeline", daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
