"""The table of a campaign, as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.chaos.evidence import Change
from tests.chaos.faults import Injected

FINAL = ("CRASHED", "FAILED", "CANCELLED")


@dataclass(frozen=True)
class RunHistory:
    """What happened to one run."""

    changes: tuple[Change, ...]
    resumed: tuple[tuple[float, float], ...]
    """Begin and end of each `likeness resume` that succeeded, Unix time in seconds."""


@dataclass(frozen=True)
class Recovery:
    """How a run came over a fault."""

    how: str
    seconds: float | None = None
    """From the fault to the next attempt's start, or to the end of `likeness resume`."""


def find_recovery(fault: Injected, faults: Sequence[Injected], run: tuple[str, RunHistory]) -> Recovery:
    """Return how a run came over a fault: an interruption belongs to the last fault that hit the run before it."""
    flow_run_id, history = run
    later = [other.at for other in faults if other.at > fault.at and flow_run_id in other.flow_run_ids]
    until = min(later, default=float("inf"))
    ended = next((c for c in history.changes if fault.at <= c.at < until and c.type in FINAL), None)
    if ended is None:
        return Recovery("continued")
    # Not the newest by time alone: a clock may have been set between two states.
    is_recovered = any(change.type == "COMPLETED" for change in history.changes) or bool(history.resumed)
    again = next((c for c in history.changes if c.at >= ended.at and c.type == "RUNNING"), None)
    if again is not None and (is_recovered or again.at < until < float("inf")):
        return Recovery("rescheduled", again.at - fault.at)
    resumed = next((end for begin, end in history.resumed if begin >= ended.at), None)
    if resumed is not None:
        return Recovery("`likeness resume`", resumed - fault.at)
    # Marked as crashed by a clock that was off, while its process lived and finished.
    is_finished = any(change.at >= ended.at and change.type == "COMPLETED" for change in history.changes)
    return Recovery("continued" if is_finished else "not recovered")


def make_table(faults: Sequence[Injected], histories: Mapping[str, RunHistory]) -> str:
    """Return one line per kind of fault."""
    lines = ["| fault | injected | runs hit | recovered | recovery time, median (max) |", "|---|---|---|---|---|"]
    for kind in dict.fromkeys(fault.kind for fault in faults):
        those = [fault for fault in faults if fault.kind == kind]
        recoveries = [
            find_recovery(fault, faults, (run, histories[run]))
            for fault in those
            for run in fault.flow_run_ids
            if run in histories
        ]
        ways = [recovery.how for recovery in recoveries]
        text = ", ".join(f"{ways.count(way)} {way}" for way in dict.fromkeys(ways)) or "-"
        seconds = [recovery.seconds for recovery in recoveries if recovery.seconds is not None]
        times = f"{statistics.median(seconds):.0f} s ({max(seconds):.0f} s)" if seconds else "-"
        lines.append(f"| {kind} | {len(those)} | {len(recoveries)} | {text} | {times} |")
    return "\n".join(lines)
