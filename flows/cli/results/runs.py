"""Terminal output about runs: tables and summaries."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from flows.cli.console import show_usd
from tasks.errors import ConfigError
from tasks.manifests.evaluation import Estimate, Shown, Side
from tasks.manifests.run_summary import RunSummary
from tasks.metrics import METRICS

if TYPE_CHECKING:
    from conf.schema import RunConfig
    from flows.cli.results.tables import Grid

WIDTH = 100
"""Of the terminal, in characters, where it is not known."""
SIDES: tuple[Side, ...] = get_args(Side)
MEANS: tuple[Shown, ...] = get_args(Shown)
AXES = {"concept_preservation": "subject", "prompt_following": "prompt", "image_quality": "image quality"}


def print_runs(summaries: list[RunSummary], *, folder: Path) -> None:
    """Print a table of runs."""
    from rich.console import Console
    from rich.table import Table

    from flows.runs.records import suggest_next

    if not summaries:
        print(f"no runs in {folder}; `likeness run` starts one")
        return
    table = Table(box=None, header_style="bold")
    for name in ("run", "status", "seconds", "LLM calls", "steps", "DINO", "CLIP-I", "CLIP-T", "judge"):
        table.add_column(name, justify="left" if name in ("run", "status") else "right")
    unfinished = [s for s in summaries if s.status not in ("finished", "resumed")]
    for summary in summaries:
        means = [summary.find_mean(name) for name in ("dino", "clip_i", "clip_t", "concept_preservation")]
        table.add_row(
            summary.run_id,
            summary.status,
            "" if summary.wall_seconds is None else f"{summary.wall_seconds:.1f}",
            "" if summary.llm_calls is None else str(summary.llm_calls),
            "" if summary.training_steps is None else str(summary.training_steps),
            *("" if mean is None else mean.show(2) for mean in means),
        )
    Console(width=160).print(table)
    if unfinished:
        print("\nunfinished, with the command that resumes:")
    for summary in unfinished:
        words = suggest_next(summary, folder / summary.run_id) or "(running)"
        print(f"  {summary.run_id}  {summary.status}: {words}")
        if summary.error is not None:
            print(f"      {summary.error.kind}: {summary.error.message}")


def print_summary(summary: RunSummary, config: "RunConfig") -> None:
    """Print headline metrics and the paths of the results."""
    assert summary.subject is not None
    print_metrics(summary)
    if summary.paths is None:  # a model from elsewhere, evaluated only
        print(f"\nrun       {summary.run_id}: {summary.wall_seconds:.1f} s, {summary.llm_calls} LLM calls")
        return
    from flows.runs.records import MODEL_LINK

    # This environment's, since PATH may hold another MLflow or none.
    mlflow = Path(sys.executable).parent / "mlflow"
    print(f"\nreport    {shorten(summary.paths.report)}")
    link = Path(summary.paths.report).parent / MODEL_LINK
    print(f"model     {shorten(str(link) if link.is_dir() else summary.paths.model)}")
    if config.tracking.kind == "mlflow":
        uri = config.tracking.uri or f"sqlite:///{shorten(str(Path(config.output_dir).absolute() / 'mlflow.db'))}"
        print(f"tracking  {shorten(str(mlflow))} ui --backend-store-uri '{uri}'")
    registered = summary.registered
    if registered is not None and registered.model is not None:
        print(f"registry  {registered.model} version {registered.version}{', the champion' * registered.is_champion}")
        for blocker in registered.blockers:
            print(f"          not the champion: {blocker}")
    cost = summary.cost_usd
    print(
        f"run       {summary.run_id}: {summary.wall_seconds:.1f} s, {summary.llm_calls} LLM calls, "
        f"{summary.training_steps} training steps, {show_usd(cost)} USD"
    )
    noun, token = summary.subject.class_noun, summary.subject.identifier_token
    print(f'try       likeness generate latest "a photo of {token} {noun} in the snow"')


def print_metrics(summary: RunSummary) -> None:
    """Print metrics and grades of both sides and their difference, with 95 % intervals as far as the width allows."""
    from flows.cli.results.tables import write_plain

    assert summary.judge is not None
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    for shown, left in ((MEANS, ""), (SIDES, "photos"), ((), "base, tuned and photos")):
        table, note = (
            write_plain(list_figures(summary, with_intervals=shown)),
            left and f"; the report has those of {left}",
        )
        if max(map(len, table.splitlines())) <= width:
            break
    print(f"\n{table}")
    if "[" in table:
        print(f"in brackets: 95 % intervals{note}")
    if not summary.judge.is_reliable:
        print(f"warning: judge scores are unreliable: {summary.judge.reason}")


def list_figures(summary: RunSummary, *, with_intervals: Sequence[str]) -> "Grid":
    """Return a row per metric and axis of the judge; some of the means with their intervals."""
    from flows.cli.results.tables import Grid

    names = {key: metric.name for key, metric in METRICS.items()}
    names |= {key: key for key in summary.estimates if key not in names}
    names |= {axis: f"judge: {name}" for axis, name in AXES.items()}
    rows = []
    for key, name in names.items():
        found = [summary.find_mean(key, side) for side in MEANS]
        largest = max((abs(each.mean) for each in found if each is not None), default=0.0)
        digits = 2 if key in AXES else 3 - (largest >= 10) - (largest >= 100)  # as wide as a cosine
        if key not in AXES and found[0] is None:
            continue
        cells = ["-" if each is None else show_mean(each, digits) for each in found[:2]]
        cells.append("" if found[2] is None else show_mean(found[2], digits))
        cells = [
            cell if side in with_intervals else cell.partition(" ")[0] for side, cell in zip(MEANS, cells, strict=True)
        ]
        gain = (summary.estimates | summary.score_estimates).get(key, {}).get("gain")
        rows.append((name, *cells, show_gain(gain, digits)))
    return Grid("", ("", "base", "tuned", "photos", "tuned - base"), tuple(rows))


def show_mean(found: Estimate, digits: int = 3) -> str:
    """Return a mean with its interval, where it has one."""
    if found.low is None or found.high is None:
        return show_cell(found.mean, digits)
    return f"{show_cell(found.mean, digits)} [{show_cell(found.low, digits)}, {show_cell(found.high, digits)}]"


def show_cell(value: float | None, digits: int = 3) -> str:
    """Return a metric in at most seven characters."""
    return "" if value is None else f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"


def show_gain(gain: Estimate | None, digits: int = 3) -> str:
    """Return a difference with its interval, or why it has none."""
    if gain is None:
        return ""
    if gain.low is None or gain.high is None:
        return f"{gain.mean:+.{digits}f} (no interval from {gain.num})"
    return f"{gain.mean:+.{digits}f} [{gain.low:+.{digits}f}, {gain.high:+.{digits}f}]"


def shorten(path: str) -> str:
    """Return a path relative to the working directory where it lies below it."""
    if "://" in path:
        return path
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else path


def find_run(output: Path, name: str, *, record: str = "report.html", is_trained: bool = False) -> Path:
    """Return a run's folder; `latest` is the newest that has a `record`, and trained its model where that is asked for.

    Raises:
        ConfigError: there is none.

    """
    from flows.runs.records import list_run_folders, read_summary

    folders = list_run_folders(output)
    if name == "latest":
        for folder in reversed(folders):
            if (folder / record).exists() and not (is_trained and read_summary(folder).evaluated is not None):
                return folder
    path = Path(name).absolute()  # a shell completes names to paths
    matches = [folder for folder in folders if folder.absolute() == path]
    matches = matches or [folder for folder in folders if folder.name == name or folder.name.endswith(f"-{name}")]
    if len(matches) == 1:
        return matches[0]
    raise ConfigError(f"no run {name!r} in {output}; `likeness runs` lists them")


def explain_no_report(folder: Path) -> str:
    """Return why a run's folder has no report, and what to do."""
    from flows.runs.records import read_summary

    summary = read_summary(folder)
    if summary.status == "finished":
        return f"the report of run {folder.name} was removed; run it again, the stages are cached"
    return (
        f"run {folder.name} has no report; it did not finish ({summary.status}); `likeness runs` shows how to resume it"
    )
