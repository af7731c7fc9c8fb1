"""The comparison as one self-contained HTML page: conclusion, tables, and samples side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli.results.comparison.side_by_side import Compared, Row
from flows.cli.results.tables import Grid, write_html
from tasks.redaction import clean_text, redact

if TYPE_CHECKING:
    from flows.cli.results.comparison.judge import Judged

FOLDER = Path(__file__).resolve().parent
MAX_CHARACTERS = 12_000_000
"""Of all pictures as base64, so that the page stays below 15 MB."""


@dataclass(frozen=True)
class Page:
    """What the page shows."""

    conclusion: str
    notes: Sequence[str]
    grids: Sequence[Grid]
    compared: Sequence[Compared]
    rows: Sequence[Row]
    judged: "Sequence[Judged]" = ()


@dataclass(frozen=True)
class Cell:
    """One sample: its picture as a data URL, and its figures."""

    name: str
    url: str
    dino: float | None
    clip_t: float | None


@dataclass(frozen=True)
class Shown:
    """One prompt and seed."""

    prompt: str
    seed: int
    cells: tuple[Cell, ...]
    choices: tuple[tuple[str, str], ...]
    """What the judge chose between the first run and another: that one's name and the outcome."""


def render_page(page: Page) -> str:
    """Return the page; everything but the style sheets of this project is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from tasks.publishing.report.template import FOLDER as REPORT

    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    samples = encode_rows(page)
    return environment.get_template("compare.html.jinja").render(
        title=" and ".join(each.name for each in page.compared),
        conclusion=clean_text(redact(page.conclusion)),
        notes=[clean_text(redact(note)) for note in page.notes],
        # `write_html` escapes every cell.
        tables=[(grid.title, Markup(write_html(grid.cleaned()))) for grid in page.grids if grid.rows],  # noqa: S704
        samples=samples,
        num_rows=len(page.rows),
        style=Markup((REPORT / "report.css").read_text()),  # noqa: S704 - this project's own
    )


def encode_rows(page: Page) -> list[Shown]:
    """Return all rows at the largest side at which they fit; at the smallest, every n-th that fits."""
    from tasks.publishing.report.pictures import SIDES, thin

    rows, shown = list(page.rows), list[Shown]()
    for side in SIDES:
        shown = [encode_row(page, row, side=side) for row in rows]
        size = sum(len(cell.url) for row in shown for cell in row.cells)
        if size <= MAX_CHARACTERS:
            return shown
    return thin(shown, max(1, len(shown) * MAX_CHARACTERS // size))


def encode_row(page: Page, row: Row, *, side: int) -> Shown:
    """Return a row with pictures of at most `side` px."""
    from tasks.publishing.report.pictures import to_data_url

    cells = []
    for each, sample in zip(page.compared, row.samples, strict=True):
        own = each.measured(sample)
        url = to_data_url(each.store, sample.image, max_side=side, is_generated=True)
        cells.append(Cell(each.name, url, own.dino if own else None, own.clip_t if own else None))
    choices = [(judged.name, judged.outcome(row, number)) for number, judged in enumerate(page.judged, 1)]
    return Shown(row.prompt, row.seed, tuple(cells), tuple(choice for choice in choices if choice[1]))
