"""The result of many subjects: `index.html`, one self-contained page, and `table.csv`."""

import base64
import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from conf.subjects import ManyRequest
from flows.subjects.records import SubjectOutcome
from tasks.errors import LikenessError
from tasks.images import decode_png, encode_jpeg
from tasks.manifests.evaluation import Estimate, Side
from tasks.manifests.publishing import Publication
from tasks.manifests.run_summary import RunSummary
from tasks.services.store.base import Store
from tasks.stage.cache import find_manifest, read_verified
from tasks.stage.digests import digest
from tasks.stage.files import write_atomic

TEMPLATE_FOLDER = Path(__file__).parent
PICTURE_SIDE = 480  # px; some 20 KB each, so that a page of hundreds stays small
MEANS: dict[str, tuple[str, Side]] = {
    "dino_base": ("dino", "base"), "dino": ("dino", "tuned"), "clip_t": ("clip_t", "tuned"),
    "judge_subject": ("concept_preservation", "tuned"),
}  # fmt: skip
"""Metric and side of the means by column."""
LABELS = ("DINO, base", "DINO, tuned", "CLIP-T", "judge: subject, of 4")
"""Of these columns on the page."""
NUMBERS = (*(f"{name}{end}" for name in MEANS for end in ("", "_low", "_high")), "seconds", "usd")
COLUMNS = ("name", "status", "run", *NUMBERS, "reason")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Row:
    """One subject of the page."""

    outcome: SubjectOutcome
    report: str
    """Relative link to the run's report; empty where there is none here."""
    picture: str
    """Data URL of the sample grid."""
    is_small: bool = False
    """Whether the picture is enlarged on the page, where smoothing would blur its pixels."""

    @property
    def means(self) -> dict[str, Estimate | None]:
        """Return the means of the page by column; None for what was not measured."""
        summary = self.outcome.summary
        return {name: summary.find_mean(*of) if summary else None for name, of in MEANS.items()}

    @property
    def numbers(self) -> list[float | None]:
        """Return the numbers of the table, as `NUMBERS` names them."""
        summary = self.outcome.summary
        ends = [(m.mean, m.low, m.high) if m else (None, None, None) for m in self.means.values()]
        times = (summary.wall_seconds, summary.cost_usd) if summary else (None, None)
        return [*(value for mean in ends for value in mean), *times]


def name_batch(request: ManyRequest) -> str:
    """Return the name of the page's folder: the same request writes the same page."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(request.subjects.removeprefix("store:")).stem)[:40].strip("-")
    return f"{stem or 'subjects'}-{digest([request.subjects, request.base.model_dump(mode='json')])[:6]}"


def show_name(subjects: str) -> str:
    """Return what the page is called: the name of the file or folder, or the prefix."""
    return subjects if subjects.startswith("store:") else Path(subjects).name


def write_index(folder: Path, outcomes: Sequence[SubjectOutcome], *, title: str, store: Store) -> Path:
    """Write page and table, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [make_row(folder, outcome, store) for outcome in outcomes]
    write_atomic(folder / "table.csv", render_table(rows))
    write_atomic(folder / "index.html", render_page(rows, title=title))
    return folder


def make_row(folder: Path, outcome: SubjectOutcome, store: Store) -> Row:
    """Return a row with the run's report and picture."""
    summary = outcome.summary
    if summary is None or summary.paths is None:
        return Row(outcome, report="", picture="")
    report = os.path.relpath(summary.paths.report, folder)
    picture = find_picture(store, summary)
    if picture is None:
        return Row(outcome, report=report, picture="")
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    url = f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(picture)).decode()}"
    return Row(outcome, report=report, picture=url, is_small=picture.width < PICTURE_SIDE)


def find_picture(store: Store, summary: RunSummary) -> Image | None:
    """Return a run's sample grid; None where it can't be had."""
    stage = summary.stages.get("publishing")
    try:
        found = find_manifest(store, Publication, stage="publishing", key=stage.key) if stage else None
        return decode_png(read_verified(store, found.sample_grid)) if found else None
    except (LikenessError, OSError):  # a page without one picture is better than none
        return None


def render_table(rows: Sequence[Row]) -> str:
    """Return the table as CSV."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for row in rows:
        numbers = ["" if value is None else f"{value:.5g}" for value in row.numbers]
        texts = [neutralize(text) for text in (row.outcome.name, row.outcome.status, row.outcome.run_id)]
        writer.writerow([*texts, *numbers, neutralize(row.outcome.reason)])
    return file.getvalue()


def neutralize(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula: names of folders and errors come from elsewhere."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def render_page(rows: Sequence[Row], *, title: str) -> str:
    """Return the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE_FOLDER), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    environment.filters["number"] = lambda value, digits: "" if value is None else f"{value:.{digits}f}"
    environment.filters["mean"] = lambda mean, digits: "" if mean is None else mean.show(digits)
    return environment.get_template("index.html.jinja").render(
        title=title, rows=rows, counts=list(count(rows)), labels=LABELS
    )


def count(rows: Sequence[Row]) -> Iterator[tuple[str, int]]:
    """Yield each status with its number of subjects."""
    statuses = [row.outcome.status for row in rows]
    for status in dict.fromkeys(statuses):
        yield status, statuses.count(status)
