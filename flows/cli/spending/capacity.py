"""`likeness capacity`: what many subjects take, from a measured run."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from flows.capacity.simulation import ADVICE, Outcome, Simulation
from flows.capacity.workload import Installation, Workload, measure_run, read_installation
from flows.cli.results.runs import find_run, shorten
from flows.cli.results.tables import Format, Grid, render
from flows.runs.records import read_run
from tasks.errors import ConfigError

MAX_SUBJECTS = 1_000_000
STEPS = (1, 100, 1_000, 10_000, 100_000)


def print_capacity(output: Path, name: str, words: Sequence[str], *, subjects: str, as_format: Format) -> int:
    """Print a row per number of subjects, with the first bottleneck and the way out."""
    offer = read_installation(list(words))
    numbers = read_numbers(subjects) if subjects else STEPS
    folder = find_run(output, name)
    work = measure_run(read_run(folder), folder)
    outcomes = [Simulation(work, offer).run(number) for number in numbers]
    header = (
        "subjects", "time", "GPU hours", "USD", "LLM requests", "database rows", "objects", "stored", "bottleneck"
    )  # fmt: skip
    grid = Grid("Capacity", header, tuple(map(describe, outcomes)))
    advice = [f"{name}: {ADVICE[name]}" for name in dict.fromkeys(each.bottleneck for each in outcomes)]
    data = {
        "run": folder.name,
        "workload": asdict(work),
        "installation": offer.model_dump(),
        "outcomes": [{**asdict(each), "bottleneck": each.bottleneck} for each in outcomes],
    }
    print(render([grid], [*list_notes(work, offer, folder), *advice], as_format=as_format, data=data))
    return 0


def read_numbers(text: str) -> tuple[int, ...]:
    """Return numbers of subjects. Raises ConfigError."""
    words = [word.strip().replace("_", "") for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= MAX_SUBJECTS for word in words):
        raise ConfigError(f"--subjects: give numbers from 1 to {MAX_SUBJECTS:,}, for example 1,100,10000")
    return tuple(map(int, words))


def describe(found: Outcome) -> tuple[str, ...]:
    """Return the cells of one row."""
    return (
        f"{found.subjects:,}",
        show_duration(found.seconds),
        f"{found.gpu_hours:,.1f}",
        f"{found.usd:,.2f}",
        f"{found.llm_requests:,}",
        f"{found.rows:,}",
        f"{found.objects:,}",
        show_bytes(found.stored_bytes),
        f"{found.bottleneck} ({max(found.use.values()):.0%})",
    )


def show_duration(seconds: float) -> str:
    """Return a duration in its natural unit."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


def show_bytes(number: float) -> str:
    """Return a size in its natural unit."""
    for size, unit in ((1e12, "TB"), (1e9, "GB")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e6:,.1f} MB"


def list_notes(work: Workload, offer: Installation, folder: Path) -> list[str]:
    """Return what was measured, and what is assumed."""
    assumed = ", ".join(f"{name}={value:g}" for name, value in offer.model_dump().items())
    waits = f", a batch job of {work.batch_requests}" if work.batch_requests else ""
    devices = f"{work.gpus} GPUs" if work.gpus > 1 else "it"
    cached = [
        f"{work.cached_replies} LLM replies of this run came from the cache: a first run of its photos sends and pays "
        "more requests"
    ]
    return [
        f"measured by {shorten(str(folder))}: {work.before_gpu:.0f} s before a GPU, {work.on_gpu:.0f} s on {devices}, "
        f"{work.after_gpu:.0f} s after; {work.llm_calls} LLM calls{waits}, {work.llm_usd:.4f} USD; {work.objects} "
        f"objects, {show_bytes(work.stored_bytes)}",
        *(cached if work.cached_replies else []),
        f"assumed (NAME=VALUE changes one): {assumed}",
        "in brackets: use of the bottleneck. All runs are queued at once; failures and retries are not simulated.",
    ]
