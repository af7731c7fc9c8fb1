"""Run a command and, on SIGTERM, let all processes below it save: `python -m deployments.images.drain COMMAND`.

A Prefect worker starts each flow run in a process group of its own and leaves it behind when it ends; a container would
then kill it without notice. Here the worker ends first and takes no further run, then every flow run gets SIGTERM:
training saves a checkpoint within `training.grace_seconds`.
"""

import signal
import subprocess
import sys
from types import FrameType

from flows.cli.stack.processes import stop_family


class TerminationRequested(BaseException):
    """SIGTERM arrived."""


def main(command: list[str]) -> int:
    """Run the command to its end; return its exit code."""
    if not command:
        print("usage: python -m deployments.images.drain COMMAND", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, request_termination)
    child = subprocess.Popen(command)
    try:
        return child.wait()
    except TerminationRequested:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Nobody else can have its pid: it is not waited for yet.
        stop_family(child.pid)
        return child.wait()


def request_termination(number: int, frame: FrameType | None) -> None:
    """Interrupt the wait for the command."""
    raise TerminationRequested


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
