"""`likeness compare`: which of several evaluated models is better, and how sure that is."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli.results.comparison.contenders import Contender, find_contenders
from flows.cli.results.comparison.judge import Judged, judge_runs
from flows.cli.results.comparison.page import Page, render_page
from flows.cli.results.comparison.side_by_side import Compared, Row, check_sheet, list_rows, load_compared, write_sheet
from flows.cli.results.runs import show_gain, show_mean
from flows.cli.results.tables import Format, Grid, render
from flows.runs.records import PastRun, read_run
from tasks.errors import ConfigError
from tasks.services.store.open import open_store

if TYPE_CHECKING:
    from tasks.evaluation.comparison import Candidate, Comparison

UNCOMPARED = ("output_dir", "store.folder")
"""Where results lie, not what they are."""
WINS = ("run", "pairs", "wins", "losses", "ties", "inconsistent", "failed", "win rate over prompts, 95 % interval")
"""Columns of the judge's pairs."""
TRAINED = ("training.", "prior.", "seed", "publishing.")
"""Settings that a model from elsewhere was not made with."""


@dataclass(frozen=True)
class Extras:
    """What is made besides the tables."""

    samples: Path | None = None
    """Contact sheet of the samples."""
    is_judged: bool = False
    """Whether the first run's judge chooses between the samples."""
    num_trials: int | None = None
    """Best trials of each sweep that is named; None: three of a single one, one beside others."""


def compare_runs(
    output: Path, names: Sequence[str], *, is_paired: bool, as_format: Format, extras: Extras = Extras()
) -> str:  # fmt: skip
    """Return the comparison of runs and trials with the first of them.

    Raises:
        ConfigError: there are fewer than two, one is unknown or unfinished, or they can't be paired.

    """
    from tasks.evaluation.comparison import UnpairedError, compare

    if extras.samples is not None:
        check_sheet(extras.samples)
    contenders = find_contenders(output, names, num_trials=extras.num_trials)
    folders = [each.folders[0] for each in contenders]
    runs = [read_run(folder) for folder in folders]
    check_encoders(runs)
    candidates = [load_contender(each) for each in contenders]
    try:
        found = compare(candidates, is_paired=is_paired)
    except UnpairedError as error:
        raise ConfigError(f"{error}; --unpaired compares the means") from error
    compared = load_compared(folders, runs, candidates)
    rows = list_rows(compared)
    judged = judge_runs(compared, rows) if extras.is_judged else []
    if extras.samples is not None:
        num = write_sheet(extras.samples, compared, rows)
        print(f"{extras.samples}: {num} of {len(rows)} prompts and seeds", file=sys.stderr)
    return show(Result(found, contenders, runs, compared, rows, judged), as_format=as_format)


@dataclass(frozen=True)
class Result:
    """All that a comparison found."""

    found: "Comparison"
    contenders: Sequence[Contender]
    runs: Sequence[PastRun]
    """The first of each contender: their training seeds are the same."""
    compared: Sequence[Compared]
    rows: Sequence[Row]
    judged: Sequence[Judged]

    @property
    def conclusion(self) -> str:
        """What may be concluded: from metrics, then from the judge."""
        said = [judged.conclude() for judged in self.judged]
        return " ".join([self.found.conclusion, *(text[0].upper() + text[1:] for text in said)])

    @property
    def notes(self) -> list[str]:
        """What the figures are of, and which of them are doubtful."""
        notes = [*self.found.notes, *(each.note for each in self.contenders if each.note)]
        if any(len(each.folders) > 1 for each in self.contenders):
            notes.append(
                "metrics pool all training seeds; pictures and the judge's pairs are of the first, without the "
                "variance between them"
            )
        return notes


def show(result: Result, *, as_format: Format) -> str:
    """Return a comparison in a format; as HTML, a whole page with the samples side by side."""
    found, runs, judged = result.found, result.runs, result.judged
    rows = diff_configurations(runs)
    grids = [
        Grid("Configuration", ("setting", *found.names), rows),
        Grid("Metrics, mean with 95 % interval", (*head_metrics(found),), tuple(list_metrics(found))),
        Grid("Pairs that the judge compared in both orders", WINS, tuple(map(list_wins, judged))),
    ]
    notes = [*result.notes, *warn_of_judges(runs)]
    if as_format == "html":
        return render_page(Page(result.conclusion, notes, grids, result.compared, result.rows, judged))
    data = {
        "runs": list(found.names),
        "is_paired": found.is_paired,
        "configuration": {name: values for name, *values in rows},
        "metrics": {
            row.key: {
                "means": [each.model_dump() for each in row.means],
                "differences": [each.model_dump() for each in row.differences],
                "photos": row.photos.model_dump() if row.photos else None,
                "metric": asdict(row.metric),
            }
            for row in found.metrics
        },
        "judges": [run.summary.judge.model_dump(mode="json") if run.summary.judge else None for run in runs],
        "pairs": {each.name: describe_wins(each) for each in judged},
        "run_ids": [[folder.name for folder in each.folders] for each in result.contenders],
        "notes": result.notes,
        "conclusion": result.conclusion,
    }
    return render(grids, [*notes, result.conclusion], as_format=as_format, data=make_json_safe(data))


def list_wins(judged: Judged) -> tuple[str, ...]:
    """Return the row of one run in the table of pairs, see WINS."""
    wins, rate = judged.wins, judged.wins.win_rate
    shown = (
        "-"
        if rate is None or rate.low is None or rate.high is None
        else f"{rate.mean:.2f} [{rate.low:.2f}, {rate.high:.2f}]"
    )
    counts = (wins.num_pairs, wins.second_wins, wins.first_wins, wins.ties, wins.inconsistent, wins.failed)
    return (judged.name, *map(str, counts), shown)


def describe_wins(judged: Judged) -> dict[str, object]:
    """Return the counts of one run as JSON shows them."""
    wins = judged.wins
    counts = {name: getattr(wins, name) for name in ("num_pairs", "ties", "inconsistent", "failed", "served_model")}
    return {
        **counts, "wins": wins.second_wins, "losses": wins.first_wins, "is_decided": wins.is_decided,
        "win_rate": None if wins.win_rate is None else wins.win_rate.model_dump(),
    }  # fmt: skip


def load_contender(contender: Contender) -> "Candidate":
    """Return the evaluation of a run, or those of a trial's seeds together. Raises ConfigError as `load_candidate`."""
    first, *others = (load_candidate(read_run(folder)) for folder in contender.folders)
    return replace(first, name=contender.name or first.name, replicates=tuple(others))


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
    from conf.compose import show_config

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
    """Return the columns: a mean per run, that of the photos, then a difference for all but the first."""
    photos = ["photos"] if has_photos(found) else []
    return ["metric", *found.names, *photos, *(f"{name} - {found.names[0]}" for name in found.names[1:])]


def list_metrics(found: "Comparison") -> list[tuple[str, ...]]:
    """Return a row per metric; a star marks differences whose interval excludes zero."""
    rows = []
    for row in found.metrics:
        differences = [f"{show_gain(each)}{' *' if each.is_decided else ''}" for each in row.differences]
        photos = [show_mean(row.photos) if row.photos else ""] if has_photos(found) else []
        rows.append((row.metric.name, *map(show_mean, row.means), *photos, *differences))
    return rows


def has_photos(found: "Comparison") -> bool:
    """Whether the models were measured on the same photos, whose own metrics stand beside theirs."""
    return any(row.photos for row in found.metrics)


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
