"""Processes of a campaign, found by a variable that all of them inherit."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

MARKER = "LIKENESS_CHAOS"
WORDS = {
    "worker": "prefect worker start",
    "flow": "prefect.engine",
    "trainer": "tasks.training.process.worker",
    "vision server": "tasks.mini.vision_server",
}
"""What the command line of each kind of process holds."""


@dataclass(frozen=True)
class Found:
    """A process of a campaign."""

    process: psutil.Process
    command: str
    flow_run_id: str
    """Empty where it belongs to no flow run."""

    def kill(self) -> None:
        """Kill it, as the OOM killer would."""
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, where it still runs."""
        with contextlib.suppress(psutil.Error):
            self.process.send_signal(number)


def list_processes(token: str) -> Iterator[Found]:
    """Yield all processes of a campaign, this one apart."""
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            if environment.get(MARKER) == token:
                flow_run_id = environment.get("PREFECT__FLOW_RUN_ID", "")
                yield Found(process, " ".join(process.cmdline()), flow_run_id)
        except psutil.Error:  # it ended meanwhile, or is another user's
            continue


def find_processes(token: str, kind: str) -> list[Found]:
    """Return the processes of a kind, oldest first."""
    found = [each for each in list_processes(token) if WORDS[kind] in each.command]
    return sorted(found, key=lambda each: each.process.pid)
