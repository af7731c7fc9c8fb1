"""The samples of several models beside each other, for every prompt and seed that all of them have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.runs.records import PastRun
from tasks.errors import ArtifactCorrupt, ConfigError
from tasks.images import decode_png
from tasks.manifests.evaluation import Evaluation, Sample, SubjectMetrics
from tasks.services.store.base import Store
from tasks.services.store.open import open_store
from tasks.stage.cache import read_verified

if TYPE_CHECKING:
    from PIL.Image import Image

    from tasks.evaluation.comparison import Candidate

MAX_ROWS = 100
"""Of a contact sheet."""
Draw = tuple[str, int]
"""Prompt template and seed."""


@dataclass(frozen=True)
class Compared:
    """A run with its evaluation, and the store that holds its samples."""

    run: PastRun
    candidate: "Candidate"
    store: Store
    folder: Path
    """The run's."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.candidate.name

    def read(self, sample: Sample) -> bytes:
        """Return a sample as PNG. Raises ArtifactCorrupt, with the run that rebuilds it."""
        try:
            return read_verified(self.store, sample.image)
        except ArtifactCorrupt as error:
            raise ArtifactCorrupt(f"a sample of {self.name} can't be shown: {error}") from error

    def measured(self, sample: Sample) -> SubjectMetrics | None:
        """Return the metrics of one sample."""
        return self.candidate.evaluation.sample_metrics.get(sample.image.key)


@dataclass(frozen=True)
class Row:
    """The samples of one prompt and seed, in the order of the models."""

    template: str
    seed: int
    samples: tuple[Sample, ...]

    @property
    def prompt(self) -> str:
        """The prompt as the first model was given it."""
        return self.samples[0].prompt or self.template


def load_compared(
    folders: Sequence[Path], runs: Sequence[PastRun], candidates: Sequence["Candidate"]
) -> list[Compared]:
    """Return the runs with their evaluations, stores and folders."""
    return [
        Compared(run, candidate, open_store(run.config.store), folder)
        for folder, run, candidate in zip(folders, runs, candidates, strict=True)
    ]


def list_rows(compared: Sequence[Compared]) -> list[Row]:
    """Return a row per prompt and seed that all models share, in the first model's order."""
    tables = [index_samples(each.candidate.evaluation) for each in compared]
    shared = [draw for draw in tables[0] if all(draw in table for table in tables)]
    return [Row(*draw, tuple(table[draw] for table in tables)) for draw in shared]


def index_samples(evaluation: Evaluation) -> Mapping[Draw, Sample]:
    """Return the tuned model's samples of the subject by prompt and seed."""
    return {
        (sample.template, sample.seed): sample
        for sample in evaluation.samples
        if sample.side == "tuned" and sample.kind == "subject"
    }


def check_sheet(path: Path) -> None:
    """Raise ConfigError for a file that can't be written, or is anything but a generated image."""
    from flows.cli.results.images.files import check_replaceable, check_target

    check_target(path, option="--samples")
    check_replaceable(path, option="--samples")


def write_sheet(path: Path, compared: Sequence[Compared], rows: Sequence[Row]) -> int:
    """Write rows as one PNG with labels, marked as generated; return how many: every n-th of more than MAX_ROWS.

    Raises:
        ConfigError: there is no row, or the file can't be written.

    """
    from flows.cli.results.images.contact_sheet import Sheet, draw_contact_sheet, fit
    from flows.cli.results.images.files import write
    from tasks.images import encode_png
    from tasks.publishing.report.pictures import thin

    if not rows:
        raise ConfigError("--samples: the runs share no prompt and seed: leave --samples out")
    shown = thin(rows, MAX_ROWS)
    cells: list[list[Image | None]] = [
        [fit(decode_png(each.read(sample))) for each, sample in zip(compared, row.samples, strict=True)]
        for row in shown
    ]
    sheet = Sheet([each.name for each in compared], [f"{row.prompt}\nseed {row.seed}" for row in shown], cells)
    facts = {"Title": "likeness compare " + " ".join(each.name for each in compared)}
    write(path, encode_png(draw_contact_sheet(sheet), is_generated=True, facts=facts), option="--samples")
    return len(shown)
