"""Run a module in a process that ends with its parent, from its first instruction on.

    python -m tasks.stage.guard MODULE [ARGUMENT ...]

The environment names a FIFO whose write end the parent holds open. However the parent ends, the kernel closes that
end, and reads return EOF. A check inside the module could only begin after its imports, which take ten seconds on a
loaded machine; this module imports nothing but the standard library.
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
    """Whether the write end is open."""
    try:
        return os.read(descriptor, 1) != b""  # empty: EOF, no writer is left
    except BlockingIOError:
        return True  # EAGAIN: a writer is there, but there is no data


def leave() -> None:
    """Send SIGTERM to this process, then exit after GRACE_SECONDS if it is still running."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(ORPHANED_EXIT_CODE)


def watch(descriptor: int) -> None:
    """Block until the parent is gone, then end this process."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while has_parent(descriptor):
        poll.poll(1000)  # returns at once when the last writer closes (POLLHUP)
    leave()


def start_watcher() -> None:
    """End this process with the parent, from now on; a fork has no threads, so it calls this again."""
    path = os.environ.get(LIFELINE)
    if not path:
        return
    try:
        # Non-blocking: opening a FIFO for reading would otherwise wait for a writer, who may be gone already.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # the parent removed its FIFO at exit
        os._exit(ORPHANED_EXIT_CODE)
    if not has_parent(descriptor):
        os._exit(ORPHANED_EXIT_CODE)
    threading.Thread(target=watch, args=(descriptor,), name="lifeline", daemon=True).start()


def main() -> None:
    """Start the watcher thread, then run the module as `__main__` in this process."""
    start_watcher()
    sys.argv = sys.argv[1:]  # the module's own command line
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
