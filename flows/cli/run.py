"""What a person at a terminal sees of a run: early checks, progress, the closing lines."""

import contextlib
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from conf.compose import compile_request
from conf.overrides import parse_overrides
from conf.request import RunRequest
from conf.schema import RunConfig
from conf.trust import allowed_roots
from flows.cli.prefect_server import EmbeddedServer, needs_server
from tasks.metrics import METRICS
from tasks.redaction import clean_text
from tasks.stage.progress import ProgressView, make_progress


def run_in_terminal(settings: list[str]) -> int:
    """Run the main job and print where its results are."""
    request = parse_overrides(settings)
    with ready_for_flows(request) as (config, progress, server):
        from flows.personalize_subject import personalize_subject
        from flows.run_context import progress_of_run

        token = progress_of_run.set(progress)
        started = time.monotonic()
        try:
            summary = personalize_subject(request)
        finally:
            progress_of_run.reset(token)
            progress.close()
    work = sum(stage["seconds"] for stage in summary["stages"].values())
    print_summary(summary, config)
    waited = f", {server.wait_seconds:.1f} s of it for the embedded Prefect server" if server else ""
    outside = time.monotonic() - started - summary["wall_seconds"] + (server.wait_seconds if server else 0.0)
    print(f"stages {work:.1f} s (some side by side), overhead {summary['overhead_seconds'] + outside:.1f} s{waited}")
    return 0


def finish_pending(output: Path) -> int:
    """Resume pending runs and say how each of them stands; 0: all done, 11: some still wait, 1: some failed."""
    from flows.cli.pending import find_readable, list_pending
    from flows.run_records import read_request, relocate

    waiting = list_pending(output)
    if not waiting:
        print(f"no run in {output} waits for a batch job")
        return 0
    folder = find_readable(waiting)
    stored = read_request(folder)
    request = relocate(stored.request, folder)
    with ready_for_flows(request, is_trusted=stored.is_trusted) as (config, progress, _):
        from flows.run_context import progress_of_run
        from flows.score_pending import score_pending

        token = progress_of_run.set(progress)
        try:
            report = score_pending(str(output))
        finally:
            progress_of_run.reset(token)
            progress.close()
    for summary in report.finished:
        print_summary(summary, config)
    for name in report.waiting:
        print(f"{name}: still waits; `likeness jobs` lists batch jobs")
    for line in report.failed:
        print(f"failed: {line}", file=sys.stderr)
    print(f"{len(report.finished)} of {len(waiting)} waiting runs finished")
    return report.exit_code


@contextlib.contextmanager
def ready_for_flows(
    request: RunRequest, *, is_trusted: bool = True
) -> Iterator[tuple[RunConfig, ProgressView, EmbeddedServer | None]]:
    """Check what can be checked at once while the embedded Prefect server starts."""
    config = compile_request(request, roots=None if is_trusted else allowed_roots())
    # At once: the next words come after seconds of imports.
    print(describe_start(config), flush=True)
    signal.signal(signal.SIGTERM, raise_interrupt)
    server = EmbeddedServer(Path(config.output_dir)) if needs_server() else None
    prepare_environment(is_embedded=server is not None)
    try:
        if server is not None:
            server.start()
        check_early(config)
        importlib.import_module("flows.personalize_subject")
        if server is not None:
            server.wait()
        yield config, make_progress(), server
    finally:
        if server is not None:
            server.stop()


def describe_start(config: RunConfig) -> str:
    """Return what is about to be done, in one line."""
    photos = "the demo photos" if config.subject.source == "demo" else clean_text(config.subject.source)
    llm = ", ".join(config.llm.used_profiles())
    return (
        f"{config.subject.class_noun} from {photos}: {config.diffusion.pretrained_model_name_or_path} "
        f"at {config.diffusion.resolution} px, "
        f"{config.training.method}, {config.training.max_train_steps} steps, LLM {llm}, output in {config.output_dir}"
    )


def raise_interrupt(signum: int, frame: FrameType | None) -> None:
    """Let a polite request to end take the same way as Ctrl-C: state is saved, children end."""
    raise KeyboardInterrupt


def check_early(config: RunConfig) -> None:
    """Refuse photos, folders and keys that can't work before anything is started."""
    from tasks.services.llm.chat.transport import read_key
    from tasks.services.store.open import open_store
    from tasks.services.tracking.open import open_tracker
    from tasks.subject.photos.ingest import check_photos
    from tasks.subject.photos.known_world import check_class_noun

    store = open_store(config.store)
    open_tracker(config.tracking, folder=Path(config.output_dir)).check()
    for name in config.llm.used_profiles():
        read_key(config.llm.profiles[name])
    if config.is_mini:
        check_class_noun(config.subject)
    check_photos(config.subject, store)


def prepare_environment(*, is_embedded: bool) -> None:
    """Keep libraries quiet, off the network and off proxies for loopback; what is set still wins."""
    defaults = {
        "PREFECT_LOGGING_LEVEL": "CRITICAL",  # errors are printed once, by us
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    if is_embedded:
        # The embedded server ends with the run, often before the last log lines are sent.
        defaults["PREFECT_LOGGING_TO_API_ENABLED"] = "false"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))
    logging.getLogger("httpx").setLevel(logging.WARNING)


def print_summary(summary: dict[str, Any], config: RunConfig) -> None:
    """Print headline figures and where everything is."""
    metrics, scores = summary["metrics"], summary["scores"]
    print(f"\n{'':16}{'base':>8}{'tuned':>8}{'photos':>8}")
    for key, metric in METRICS.items():
        cells = [metrics[side].get(key) for side in ("base", "tuned", "ceiling")]
        if cells[0] is None:
            continue
        print(f"{metric.name:16}" + "".join(f"{cell:8.3f}" if cell is not None else f"{'':8}" for cell in cells))
    axes = (("concept_preservation", "subject"), ("prompt_following", "prompt"), ("image_quality", "drawing"))
    for key, name in ((key, f"judge: {axis}") for key, axis in axes):
        cells = [scores.get(side, {}).get(key) for side in ("base", "tuned")]
        print(f"{name:16}" + "".join(f"{cell:8.2f}" if cell is not None else f"{'–':>8}" for cell in cells))
    if not summary["judge"]["is_reliable"]:
        print(f"judge's grades are not reliable: {summary['judge']['reason']}")
    mlflow = Path(sys.executable).parent / "mlflow"
    print(f"\nreport    {shorten(summary['paths']['report'])}")
    print(f"model     {shorten(summary['paths']['model'])}")
    if config.tracking.kind == "mlflow":
        uri = config.tracking.uri or f"sqlite:///{shorten(str(Path(config.output_dir).absolute() / 'mlflow.db'))}"
        print(f"tracking  {shorten(str(mlflow))} ui --backend-store-uri '{uri}'")
    cost = summary["cost_usd"]
    print(
        f"run       {summary['run_id']}: {summary['wall_seconds']:.1f} s, {summary['llm_calls']} LLM calls, "
        f"{summary['training_steps']} training steps, {'unknown cost' if cost is None else f'{cost:.4f} USD'}"
    )
    noun, token = summary["subject"]["class_noun"], summary["subject"]["identifier_token"]
    print(f'try       likeness generate latest "a photo of {token} {noun} in the snow"')


def shorten(path: str) -> str:
    """Return a path relative to the working directory where it lies below it."""
    if "://" in path:
        return path
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else path


def print_runs(summaries: list[dict[str, Any]], *, folder: Path) -> None:
    """Print a table of runs."""
    from rich.console import Console
    from rich.table import Table

    from flows.run_records import suggest_next

    if not summaries:
        print(f"no runs in {folder}; `likeness run` makes one")
        return
    table = Table(box=None, header_style="bold")
    for name in ("run", "status", "seconds", "LLM calls", "steps", "DINO", "CLIP-I", "CLIP-T", "judge"):
        table.add_column(name, justify="left" if name in ("run", "status") else "right")
    unfinished = [s for s in summaries if s["status"] not in ("finished", "continued")]
    for summary in summaries:
        tuned = summary.get("metrics", {}).get("tuned", {})
        judge = summary.get("scores", {}).get("tuned", {}).get("concept_preservation")
        table.add_row(
            summary["run_id"],
            summary["status"],
            f"{summary['wall_seconds']:.1f}" if "wall_seconds" in summary else "",
            str(summary.get("llm_calls", "")),
            str(summary.get("training_steps", "")),
            *(f"{tuned[key]:.3f}" if key in tuned else "" for key in ("dino", "clip_i", "clip_t")),
            f"{judge:.2f}" if judge is not None else "",
        )
    Console(width=160).print(table)
    if unfinished:
        print("\nnot finished, and what to type next:")
    for summary in unfinished:
        words = suggest_next(summary, folder / summary["run_id"]) or "(at work)"
        print(f"  {summary['run_id']}  {summary['status']}: {words}")
        if "error" in summary:
            print(f"      {summary['error'].get('kind')}: {summary['error'].get('message')}")


def sweep_in_terminal(settings: list[str], *, num_trials: int, study: str) -> int:
    """Run a sweep and print its trials."""
    from conf.sweep import parse_sweep

    request = parse_sweep(settings, num_trials=num_trials, study=study)
    with ready_for_flows(request.base) as (_, progress, _):
        from flows.run_context import progress_of_run
        from flows.sweep_settings import print_sweep, sweep_settings

        token = progress_of_run.set(progress)
        try:
            outcome = sweep_settings(request)
        finally:
            progress_of_run.reset(token)
            progress.close()
    print_sweep(outcome)
    return 0
