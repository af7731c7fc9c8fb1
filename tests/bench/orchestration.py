"""Overhead, triggers, recovery and queues of runs on a local stack, and a sweep against single runs.

    python -m tests.bench.orchestration [--runs 8] [--trials 12] [--repeats 3] [--parts ...]

Prints Markdown. With PostgreSQL's programs installed, `--postgres URL` measures overhead on that database too.
"""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from flows.cli.stack.processes import start_detached, stop
from flows.cli.stack.stack import POOL, WORKER, StackOptions, prefect_environment, read_state
from flows.runs.records import list_summaries
from tests.bench.main_job import describe_machine
from tests.support.cli_sandbox import QUICK, CliSandbox
from tests.support.prefect_api import create_flow_run, open_api, read_states, wait_for_type

SECONDS = 1800.0
PARTS = ("overhead", "steps", "trigger", "recovery", "queue", "sweep", "storage")
FINAL = ("COMPLETED", "FAILED", "CANCELLED")
Row = tuple[str, str]


@dataclass(frozen=True)
class Bench:
    """Where runs are measured."""

    sandbox: CliSandbox
    runs: int
    trials: int
    repeats: int = 3
    postgres: str = ""

    @property
    def output(self) -> Path:
        return self.sandbox.output

    def words(self, *settings: str) -> list[str]:
        return [*QUICK, f"output_dir={self.output}", *settings]


@contextmanager
def running_stack(bench: Bench, *options: str) -> Iterator[None]:
    """Run `likeness up` and, at the end, `likeness down`."""
    ports = ["--prefect-port=0", "--mlflow-port=0", "--reports-port=0"]
    done = bench.sandbox.likeness("up", *ports, *options, timeout=SECONDS)
    if done.returncode:
        raise SystemExit(done.stderr)
    try:
        yield
    finally:
        bench.sandbox.likeness("down", timeout=SECONDS)


def measure_overhead(bench: Bench) -> list[Row]:
    """Measure runs whose stages are all cached.

    What such a run takes is overhead by definition: processes, imports, checks, states and records.
    """
    run_plainly(bench)
    embedded = [time_command(bench, "run", *bench.words()) for _ in range(bench.repeats)]
    rows = [("cached run, `likeness run`, embedded server", show(embedded))]
    for name, options in list_databases(bench).items():
        with running_stack(bench, *options), open_api(bench.output) as client:
            alone, whole = [], []
            for _ in range(bench.repeats):
                begun = time.time()
                run = create_flow_run(client, bench.words())
                alone.append(float(wait_for_type(client, run, *FINAL, seconds=SECONDS)["total_run_time"]))
                whole.append(time.time() - begun)
            rows.append((f"cached run on the stack, {name}: flow run alone", show(alone)))
            rows.append((f"the same, from API call to Completed, {name}", show(whole)))
    return rows


def measure_steps(bench: Bench) -> list[Row]:
    """Measure what a training step takes on the embedded server and on the stack: the same worker process."""
    rows: list[Row] = []
    words = ["training.max_train_steps=40", "training.checkpointing_steps=40"]
    begun = run_plainly(bench, *words, "seed=501")
    rows.append(("training of 40 steps, embedded server", f"{begun:.1f} s, {begun / 40 * 1000:.0f} ms a step"))
    for seed, (name, options) in enumerate(list_databases(bench).items(), 502):
        with running_stack(bench, *options), open_api(bench.output) as client:
            run = create_flow_run(client, bench.words(*words, f"seed={seed}"))
            wait_for_type(client, run, *FINAL, seconds=SECONDS)
        seconds = list_summaries(bench.output)[0].stages["training"].seconds
        rows.append((f"the same on the stack, {name}", f"{seconds:.1f} s, {seconds / 40 * 1000:.0f} ms a step"))
    return rows


def list_databases(bench: Bench) -> dict[str, list[str]]:
    """Return the options of `likeness up` by database."""
    return {"SQLite": [], **({"PostgreSQL": [f"--postgres={bench.postgres}"]} if bench.postgres else {})}


def run_plainly(bench: Bench, *settings: str) -> float:
    """Run in a terminal and return the seconds of its training stage."""
    done = bench.sandbox.likeness("run", *bench.words(*settings), timeout=SECONDS)
    if done.returncode:
        raise SystemExit(done.stderr)
    return list_summaries(bench.output)[0].stages["training"].seconds


def time_command(bench: Bench, *words: str) -> float:
    """Return the wall time of a command that succeeds."""
    started = time.monotonic()
    done = bench.sandbox.likeness(*words, timeout=SECONDS)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.monotonic() - started


def measure_trigger(bench: Bench) -> list[Row]:
    """Measure from `create_flow_run`, as the UI calls it, to the first training step."""
    spans: dict[str, list[float]] = {"Running": [], "first training step": []}
    with running_stack(bench), open_api(bench.output) as client:
        for seed in range(601, 601 + bench.repeats):
            begun = time.time()
            run = create_flow_run(client, bench.words(f"seed={seed}"))
            wait_until(lambda: bool(list_training(bench, "*/losses.jsonl")))
            spans["first training step"].append(time.time() - begun)
            wait_for_type(client, run, *FINAL, seconds=SECONDS)
            spans["Running"].append(find_time(read_states(client, run), "RUNNING") - begun)
    return [(f"API call to {name}, other stages cached", show(values)) for name, values in spans.items()]


def list_training(bench: Bench, pattern: str) -> list[Path]:
    """Return files of trainings in progress that hold something."""
    return [path for path in (bench.output / "work" / "training").glob(pattern) if path.stat().st_size]


def find_time(states: Sequence[dict[str, Any]], kind: str, *, after: float = 0.0) -> float:
    """Return when a flow run entered a state of a type, in Unix seconds."""
    times = [datetime.fromisoformat(state["timestamp"]).timestamp() for state in states if state["type"] == kind]
    return min(at for at in times if at > after)


def measure_recovery(bench: Bench) -> list[Row]:
    """Measure from kill -9 of a flow's process during training to its next attempt and to its next step."""
    again, lost = [], []
    with running_stack(bench), open_api(bench.output) as client:
        for seed in range(701, 701 + bench.repeats):
            words = bench.words(f"seed={seed}", "training.max_train_steps=30", "training.checkpointing_steps=2")
            run = create_flow_run(client, words)
            wait_until(lambda: bool(list_training(bench, "*/checkpoints/step-*/manifest.json")))
            worker = read_state(bench.output).find(WORKER)
            assert worker is not None
            killed = time.time()
            for process in psutil.Process(worker.pid).children():
                process.send_signal(signal.SIGKILL)
            wait_for_type(client, run, "CRASHED", *FINAL, seconds=SECONDS)
            wait_for_type(client, run, *FINAL, seconds=SECONDS)
            again.append(find_time(read_states(client, run), "RUNNING", after=killed) - killed)
            counts = list_summaries(bench.output)[0].stages["training"].counts
            lost.append(30 - counts["resumed_from_step"])
    steps = f"{statistics.median(lost):.0f} of 30"
    return [
        ("kill -9 of the flow's process to its next attempt, by the automation", show(again)),
        ("training steps of that attempt (a checkpoint every 2)", steps),
    ]


def measure_queue(bench: Bench) -> list[Row]:
    """Measure runs queued at once for two workers: each is executed once, and none is lost."""
    with running_stack(bench, "--max-runs=2"), second_worker(bench), open_api(bench.output) as client:
        begun = time.time()
        runs = [create_flow_run(client, bench.words(f"seed={801 + index}")) for index in range(bench.runs)]
        ends = [wait_for_type(client, run, *FINAL, seconds=SECONDS) for run in runs]
        seconds = time.time() - begun
    states = [run["state_type"] for run in ends]
    finished = [each.flow_run_id for each in list_summaries(bench.output) if each.status == "finished"]
    doubled = sum(finished.count(run) > 1 for run in runs)
    lost = sum(run not in finished for run in runs)
    text = f"{seconds:.0f} s, {states.count('COMPLETED')} completed, {lost} lost, {doubled} doubled"
    return [(f"{bench.runs} queued runs on two workers", text)]


@contextmanager
def second_worker(bench: Bench) -> Iterator[None]:
    """Run another worker of the stack's pool."""
    port = next(process.port for process in read_state(bench.output).processes if process.port)
    options = StackOptions(bench.output, 0, 0, 0)
    worker = start_detached(
        "worker", [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"],
        log=options.folder / "logs" / "worker-2.log",
        environment={**bench.sandbox.environment(), **prefect_environment(options, port)},
    )  # fmt: skip
    try:
        yield
    finally:
        stop(worker)


def measure_sweep(bench: Bench) -> list[Row]:
    """Compare a sweep with as many single runs of the same settings: each from nothing, or all in one folder.

    Runs in one folder share stages and the base model's samples as trials do, but no process.
    """
    rates = [f"{(index + 1) * 1e-5:.1e}" for index in range(bench.trials)]
    assert len(set(rates)) == bench.trials
    joined = ",".join(rates)
    swept = time_in_folder(bench, "sweep", "sweep", f"training.learning_rate={joined}")
    shared = sum(time_in_folder(bench, "single", "run", f"training.learning_rate={rate}") for rate in rates)
    apart = sum(time_in_folder(bench, f"single-{rate}", "run", f"training.learning_rate={rate}") for rate in rates)
    return [
        (f"sweep of {bench.trials} trials", f"{swept:.0f} s"),
        (f"the same settings as {bench.trials} runs of `likeness run`, in a folder each", f"{apart:.0f} s"),
        ("the same in one folder, where they share stages", f"{shared:.0f} s"),
        ("ratios", f"{swept / apart:.2f}, {swept / shared:.2f}"),
    ]


def time_in_folder(bench: Bench, name: str, command: str, setting: str) -> float:
    """Return the wall time of a command in an output folder of its own name, which may exist."""
    own = replace(bench, sandbox=replace(bench.sandbox, folder=bench.sandbox.folder / name))
    own.sandbox.folder.mkdir(exist_ok=True)
    return time_command(own, command, *own.words("tracking=none", "publishing=local", setting))


def measure_storage(bench: Bench) -> list[Row]:
    """Measure requests and bytes of a cold and a cached run with a bucket."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ.setdefault(name, "testing")
    words = [sys.executable, "-m", "tests.bench.storage"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=True)
    cells = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| c")]
    return [
        (f"bucket, {name} run", f"{requests}; {sent} sent, {received} received")
        for name, requests, sent, received in cells
    ]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("it never happened")
        time.sleep(0.1)


def show(values: Sequence[float]) -> str:
    """Return median and range."""
    return f"{statistics.median(values):.1f} s ({min(values):.1f} to {max(values):.1f}, n={len(values)})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8, help="runs of the queue")
    parser.add_argument("--trials", type=int, default=12, help="trials of the sweep")
    parser.add_argument("--repeats", type=int, default=3, help="of each measured run")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--postgres", default="", metavar="URL", help="postgresql+asyncpg://...: measured too")
    parser.add_argument("--out", type=Path, default=Path("build/bench-orchestration"))
    options = parser.parse_args()
    folder = options.out.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bench = Bench(CliSandbox(folder), options.runs, options.trials, options.repeats, options.postgres)
    parts: dict[str, Callable[[Bench], list[Row]]] = {
        "overhead": measure_overhead, "steps": measure_steps, "trigger": measure_trigger, "recovery": measure_recovery,
        "queue": measure_queue, "sweep": measure_sweep, "storage": measure_storage,
    }  # fmt: skip
    print(f"{describe_machine()}; load {os.getloadavg()[0]:.1f}\n\n| figure | measured |\n|---|---|", flush=True)
    for name in options.parts.split(","):
        for title, value in parts[name](bench):
            print(f"| {title} | {value} |", flush=True)


if __name__ == "__main__":
    main()
