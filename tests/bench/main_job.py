"""Measure the main job's figures and print them as Markdown.

    python -m tests.bench.main_job [--out build/bench] [--quick]

Runs the demo from nothing and again, three more subjects of other classes, each with prior
preservation on and off, and once against a running Prefect server. Half an hour on two cores.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from tasks.mini.world.scenes import draw_subject

ROOT = Path(__file__).resolve().parent.parent.parent
SUBJECTS = (("mug", 3), ("robot", 5), ("house", 11))


@dataclass(frozen=True)
class Measured:
    """One run of the command line."""

    seconds: float
    peak_bytes: int
    summary: dict[str, Any]

    @property
    def overhead(self) -> float:
        """Wall time less the stages' own work; class images are drawn beside the captions."""
        stages = self.summary["stages"]
        beside = min(stages["prior"]["seconds"], stages["subject"]["seconds"])
        return float(self.seconds - sum(stage["seconds"] for stage in stages.values()) + beside)


def measure(out: Path, *words: str, environment: dict[str, str] | None = None) -> Measured:
    """Run `likeness run` and watch its time and the memory of all its processes."""
    command = [sys.executable, "-m", "flows.cli.main", "run", f"output_dir={out}", *words]
    base = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    settings = {**base, "PREFECT_HOME": str(out / "prefect"), "HF_HUB_OFFLINE": "1", **(environment or {})}
    started = time.monotonic()
    with (out / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=log, stderr=log)
        peaks = [0]
        watcher = threading.Thread(target=watch_memory, args=(process, peaks))
        watcher.start()
        code = process.wait()
        watcher.join()
    if code:
        raise SystemExit(f"{' '.join(words)}: exit code {code}; see {out / 'log'}")
    newest = sorted(out.glob("*/summary.json"))[-1]
    return Measured(time.monotonic() - started, peaks[0], json.loads(newest.read_text()))


def watch_memory(process: "subprocess.Popen[bytes]", peaks: list[int]) -> None:
    """Keep the largest proportional memory (PSS) of a process and all below it."""
    while process.poll() is None:
        total = 0
        try:
            root = psutil.Process(process.pid)
            for member in (root, *root.children(recursive=True)):
                total += member.memory_full_info().pss
        except psutil.Error:
            pass
        peaks[0] = max(peaks[0], total)
        time.sleep(0.5)


def measure_picture(out: Path) -> float:
    """Return the median seconds of three `likeness generate latest`, each a whole process."""
    command = [sys.executable, "-m", "flows.cli.main", "generate", "latest", "a photo of sks fish in the snow"]
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run([*command, "--output-dir", str(out)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.monotonic() - started)
    return sorted(seconds)[1]


def measure_against_server(out: Path) -> Measured:
    """Measure a run of nothing new against a Prefect server that already runs."""
    url = "http://127.0.0.1:4287/api"
    environment = {**os.environ, "PREFECT_HOME": str(out / "prefect"), "PREFECT_API_URL": url}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", "4287"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        return measure(out, environment={"PREFECT_API_URL": url})
    finally:
        server.terminate()
        server.wait(60)


def show_gain(summary: dict[str, Any], metric: str) -> str:
    """Return a metric's mean gain over the base model with its 95 % interval over prompts."""
    gain = summary["estimates"][metric]["gain"]
    if gain["low"] is None:  # too few prompts
        return f"{gain['mean']:+.3f}"
    return f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def quality_row(name: str, on: Measured, off: Measured | None) -> str:
    """Return one line of the quality table."""
    m = on.summary["metrics"]
    cells = [name]
    for key in ("dino", "clip_i"):
        base, tuned, ceiling = (m[side][key] for side in ("base", "tuned", "ceiling"))
        cells.append(f"{base:.3f} -> {tuned:.3f} ({ceiling:.3f}), {show_gain(on.summary, key)}")
        cells.append(f"{(tuned - base) / (ceiling - base) * 100:.0f} %")
    change = (m["tuned"]["clip_t"] - m["base"]["clip_t"]) / m["base"]["clip_t"] * 100
    cells.append(f"{m['base']['clip_t']:.3f} -> {m['tuned']['clip_t']:.3f} ({change:+.1f} %), "
                 f"{show_gain(on.summary, 'clip_t')}")  # fmt: skip
    for key in ("pres", "dino_div"):
        without = f"{off.summary['metrics']['tuned'][key]:.3f}" if off else "-"
        cells.append(f"{m['tuned'][key]:.3f} / {without}")
    scores = on.summary["scores"]
    cells.append(f"{scores['base']['concept_preservation']:.2f} -> {scores['tuned']['concept_preservation']:.2f}")
    return f"| {' | '.join(cells)} |"


def describe_machine() -> str:
    """Return machine, date and versions in one line."""
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "diffusers", "pytorch-lightning", "prefect"))
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB, no GPU; "
        f"Python {platform.python_version()}, {versions}; {time.strftime('%Y-%m-%d')}"
    )


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--quick", action="store_true", help="the demo alone, with prior on and off")
    options = parser.parse_args()
    out = options.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    first = measure(out)
    second = measure(out)
    served = measure_against_server(out)
    print(f"\n{describe_machine()}\n\n| figure | measured | target |\n|---|---|---|")
    print(f"| demo, from nothing to report | {first.seconds:.0f} s | 300 s |")
    calls = f"{second.summary['llm_calls']} LLM calls, {second.summary['training_steps']} training steps"
    print(f"| second run | {second.seconds:.1f} s, {calls} | 25 s, 0, 0 |")
    print(f"| peak memory, all processes | {first.peak_bytes / 2**30:.2f} GiB | 3 GiB |")
    print(f"| overhead, embedded server | {second.overhead:.1f} s | 25 s |")
    print(f"| overhead, running server | {served.overhead:.1f} s | 8 s |")
    print(f"| a picture by `likeness generate`, whole process | {measure_picture(out):.1f} s | 5 s |")
    rows = [quality_row("fish (demo)", first, measure(out, "prior=none"))]
    for noun, seed in () if options.quick else SUBJECTS:
        folder = out / "photos" / noun
        draw_subject(noun, seed=seed, num=5, folder=folder)
        words = (f"subject.source={folder}", f"subject.class_noun={noun}")
        rows.append(quality_row(noun, measure(out, *words), measure(out, "prior=none", *words)))
    names = ["subject", "DINO (photos)", "gap closed", "CLIP-I (photos)", "gap closed", "CLIP-T"]
    names += ["PRES on / off", "DINO-DIV on / off", "judge"]
    print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
