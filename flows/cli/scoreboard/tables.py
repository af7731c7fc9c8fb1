"""The tables of a scoreboard."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from flows.cli.results.compare import make_json_safe
from flows.cli.results.runs import show_gain, show_mean
from flows.cli.results.tables import Format, Grid, render
from flows.scoreboard.cells import Result
from flows.scoreboard.plan import BASE
from tasks.manifests.evaluation import Estimate
from tasks.metrics import METRICS

if TYPE_CHECKING:
    from flows.scoreboard.standings import Standings

COLUMNS = ("dino", "clip_i", "clip_t", "pres", "div", "dino_div", "dino_spread", "copies")
DIFFERENCES = ("dino", "clip_t", "pres", "div", "dino_spread")
NOTHING = "-"


def show(standings: "Standings", results: Sequence[Result], *, reference: str, as_format: Format) -> str:
    """Return the tables and what may be concluded from them."""
    grids = [
        list_methods(standings),
        list_differences(standings, reference),
        list_findings(standings),
        list_preferences(standings),
    ]
    return render(grids, list_notes(standings, results), as_format=as_format, data=make_data(standings, results))


def list_methods(standings: "Standings") -> Grid:
    """Return the means of all methods, of the base model, and among real photos."""
    own = sorted({*standings.metrics} - METRICS.keys())
    shown = [name for name in (*COLUMNS, *own) if name in standings.metrics]
    rows = [
        (
            row.method,
            NOTHING if row.method == BASE else str(row.num_models),
            *(show_mean(row.means[name]) if name in row.means else NOTHING for name in shown),
        )
        for row in standings.rows
    ]
    photos = (show_mean(standings.ceiling[name]) if name in standings.ceiling else NOTHING for name in shown)
    rows.append(("real photos", NOTHING, *photos))
    return Grid("Methods", ("method", "models", *map(name_metric, shown)), tuple(rows))


def list_differences(standings: "Standings", reference: str) -> Grid:
    """Return paired differences to one method."""
    shown = [name for name in DIFFERENCES if name in standings.metrics]
    rows = [
        (row.method, *(mark(row.differences.get(name)) for name in shown)) for row in standings.rows if row.differences
    ]
    header = (f"less {reference}", *map(name_metric, shown))
    return Grid(f"Differences to {reference}, paired by subject, prompt and seed", header, tuple(rows))


def list_findings(standings: "Standings") -> Grid:
    """Return published findings with what was measured."""
    rows = tuple(
        (
            found.direction.claim,
            f"{name_metric(found.metric)}, {found.direction.method} less {found.direction.reference}",
            mark(found.difference),
            found.verdict,
        )
        for found in standings.findings
    )
    return Grid("Published findings", ("finding", "measured as", "difference", "verdict"), rows)


def list_preferences(standings: "Standings") -> Grid:
    """Return for each subject the methods that none beats, with their differences to the base model."""
    rows = [
        (each.subject, method, *(mark(each.gains.get(method, {}).get(name)) for name in ("dino", "clip_t")))
        for each in standings.preferences
        for method in each.preferred
    ]
    return Grid(
        "Preferred by subject", ("subject", "beaten by none", "DINO less base", "CLIP-T less base"), tuple(rows)
    )


def name_metric(key: str) -> str:
    """Return a metric's name; one of another package is called as it is registered."""
    return METRICS[key].name if key in METRICS else key


def mark(found: Estimate | None) -> str:
    """Return a difference; a star where its interval excludes zero."""
    return NOTHING if found is None else f"{show_gain(found)}{' *' if found.is_decided else ''}"


def list_notes(standings: "Standings", results: Sequence[Result]) -> list[str]:
    """Return how the tables are read, and which cells failed."""
    from tasks.evaluation.comparison import limit_trainings

    subjects = dict.fromkeys(result.cell.subject for result in results)
    over = max((mean.num for row in standings.rows for mean in row.means.values()), default=0)
    how = f"{len(subjects)} subjects: {', '.join(subjects)}."
    trainings = Counter((result.cell.method, result.cell.subject) for result in results if not result.error)
    single = dict.fromkeys(method for (method, _), num in trainings.items() if num == 1)
    methods = dict.fromkeys(method for method, _ in trainings)
    what = limit_trainings(list(single), len(methods))
    if len(subjects) == over:
        how += " Means and 95 % intervals are over subjects (Student's t), each with trainings of its own."
        what = f"For one subject alone: {what}"
    else:
        how += " Means and 95 % intervals are over their prompts: they hold for these subjects alone."
    how += (
        " * marks intervals that exclude zero. A method beats another where it is better in DINO or CLIP-T and worse "
        f"in neither, by the paired comparison of one subject's prompts. {what} Not corrected for multiple comparisons."
    )
    failed = [f"failed: {result.cell.name}: {result.error}" for result in results if result.error]
    return [how, *failed]


def make_data(standings: "Standings", results: Sequence[Result]) -> object:
    """Return everything as JSON has it, with the command of each cell."""
    cells = [
        {
            "method": result.cell.method,
            "subject": result.cell.subject,
            "seed": result.cell.seed,
            "command": result.cell.command,
            "run": result.folder.name if result.folder else None,
            "error": result.error,
        }
        for result in results
    ]
    rows = [
        {
            "method": row.method,
            "models": row.num_models,
            "means": dump(row.means),
            "differences": dump(row.differences),
        }
        for row in standings.rows
    ]
    findings = [
        {
            **found.direction.model_dump(mode="json"),
            "metric": found.metric,
            "difference": found.difference.model_dump() if found.difference else None,
            "verdict": found.verdict,
        }
        for found in standings.findings
    ]
    preferences = [
        {**asdict(each), "gains": {method: dump(gains) for method, gains in each.gains.items()}}
        for each in standings.preferences
    ]
    data = {
        "methods": rows,
        "real_photos": dump(standings.ceiling),
        "findings": findings,
        "preferences": preferences,
        "models": cells,
    }
    return make_json_safe(data)


def dump(estimates: dict[str, Estimate]) -> dict[str, object]:
    """Return estimates as plain data."""
    return {name: found.model_dump() for name, found in estimates.items()}
