"""`likeness compare`: which of several evaluated models is better, and how sure that is."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli.results.runs import find_run, show_cell, show_gain
from flows.cli.results.tables import Format, Grid, render
from flows.runs.records import PastRun, read_run
from tasks.errors import ConfigError
from tasks.manifests.evaluation import Estimate
from tasks.services.store.open import open_store

if TYPE_CHECKING:
    from tasks.evaluation.comparison import Candidate, Comparison

UNCOMPARED = ("output_dir", "store.folder")
"""Where results lie, not what they are."""
TRAINED = ("training.", "prior.", "seed", "publishing.")
"""Settings that a model from elsewhere was not made with."""


def compare_runs(output: Path, names: Sequence[str], *, is_paired: bool, as_format: Format) -> str:
    """Return the comparison of runs with the first of them.

    Raises:
        ConfigError: there are fewer than two, one is unknown or unfinished, or they can't be paired.

    """
    from tasks.evaluation.comparison import UnpairedError, compare

    if len(names) < 2:
        raise ConfigError("compare takes at least two runs; `likeness runs` lists them")
    folders = [find_run(output, name) for name in names]
    if len(set(folders)) < len(folders):
        raise ConfigError("the same run is named twice; `likeness runs` lists all of them")
    runs = [read_run(folder) for folder in folders]
    check_encoders(runs)
    try:
        found = compare([load_candidate(run) for run in runs], is_paired=is_paired)
    except UnpairedError as error:
        raise ConfigError(f"{error}; --unpaired compares the means") from error
    rows = diff_configurations(runs)
    grids = [
        Grid("Configuration", ("setting", *found.names), rows),
        Grid("Metrics, mean with 95 % interval", (*head_metrics(found),), tuple(list_metrics(found))),
    ]
    data = {
        "runs": list(found.names),
        "is_paired": found.is_paired,
        "configuration": {name: values for name, *values in rows},
        "metrics": {
            row.key: {
                "means": [each.model_dump() for each in row.means],
                "differences": [each.model_dump() for each in row.differences],
                "metric": asdict(row.metric),
            }
            for row in found.metrics
        },
        "judges": [run.summary.judge.model_dump(mode="json") if run.summary.judge else None for run in runs],
        "notes": list(found.notes),
        "conclusion": found.conclusion,
    }
    notes = [*found.notes, *warn_of_judges(runs), found.conclusion]
    return render(grids, notes, as_format=as_format, data=make_json_safe(data))


def load_candidate(run: PastRun) -> "Candidate":
    """Return a run's evaluation with its grades. Raises ConfigError for an unfinished run, or missing manifests."""
    from flows.runs.promotion import load_evaluated

    keys = {stage: run.find_stage_key(stage) for stage in ("evaluation", "subject")}
    if "scoring" in run.summary.stages:
        keys["scoring"] = run.find_stage_key("scoring")
    return load_evaluated(open_store(run.config.store), run.summary.run_id, keys)


def check_encoders(runs: Sequence[PastRun]) -> None:
    """Raise ConfigError where metrics were measured with other encoders: their cosines have no common scale."""
    first = runs[0]
    for run in runs[1:]:
        if run.config.evaluation.encoders != first.config.evaluation.encoders:
            raise ConfigError(
                f"{run.summary.run_id} and {first.summary.run_id} were measured with other encoders "
                "(evaluation.encoders): none of their metrics compare"
            )


def diff_configurations(runs: Sequence[PastRun]) -> tuple[tuple[str, ...], ...]:
    """Return the settings in which runs differ, with the value of each."""
    from flows.runs.context import show_config

    tables = [dict(show_config(run.config)) for run in runs]
    for run, table in zip(runs, tables, strict=True):
        if run.summary.evaluated is not None:
            for name in [name for name in table if name.startswith(TRAINED)]:
                table[name] = "-"
            table["model"] = run.summary.evaluated.location
    names = [name for name in dict.fromkeys(name for table in tables for name in table) if name not in UNCOMPARED]
    rows = [(name, *(table.get(name, "") for table in tables)) for name in names]
    return tuple(row for row in rows if len({value for value in row[1:] if value != "-"}) > 1 or row[0] == "model")


def head_metrics(found: "Comparison") -> list[str]:
    """Return the columns: a mean per run, then a difference for all but the first."""
    return ["metric", *found.names, *(f"{name} - {found.names[0]}" for name in found.names[1:])]


def list_metrics(found: "Comparison") -> list[tuple[str, ...]]:
    """Return a row per metric; a star marks differences whose interval excludes zero."""
    rows = []
    for row in found.metrics:
        differences = [f"{show_gain(each)}{' *' if each.is_decided else ''}" for each in row.differences]
        rows.append((row.metric.name, *map(show_mean, row.means), *differences))
    return rows


def show_mean(found: Estimate) -> str:
    """Return a mean with its interval."""
    if found.low is None or found.high is None:
        return show_cell(found.mean)
    return f"{show_cell(found.mean)} [{show_cell(found.low)}, {show_cell(found.high)}]"


def warn_of_judges(runs: Sequence[PastRun]) -> list[str]:
    """Return a warning for each run whose grades are not reliable."""
    judged = [(run.summary.run_id, run.summary.judge) for run in runs]
    return [
        f"warning: the grades of {name} are unreliable: {judge.reason}"
        for name, judge in judged
        if judge is not None and not judge.is_reliable
    ]


def make_json_safe(value: object) -> object:
    """Return nested data without infinite numbers, which JSON lacks."""
    if isinstance(value, dict):
        return {str(name): make_json_safe(child) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [make_json_safe(child) for child in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
