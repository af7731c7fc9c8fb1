"""The samples of several models beside each other, for every prompt and seed that all of them have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.runs.records import PastRun
from tasks.errors import ArtifactCorrupt
from tasks.images import decode_png
from tasks.manifests.evaluation import Evaluation, Sample, SubjectMetrics
from tasks.services.store.base import Store
from tasks.services.store.open import open_store
from tasks.stage.cache import read_verified

if TYPE_CHECKING:
    from PIL.Image import Image

    from tasks.evaluation.comparison import Candidate

Draw = tuple[str, int]
"""Prompt template and seed."""


@dataclass(frozen=True)
class Compared:
    """A run with its evaluation, and the store that holds its samples."""

    run: PastRun
    candidate: "Candidate"
    store: Store

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


def load_compared(runs: Sequence[PastRun], candidates: Sequence["Candidate"]) -> list[Compared]:
    """Return the runs with their evaluations and stores."""
    return [
        Compared(run, candidate, open_store(run.config.store)) for run, candidate in zip(runs, candidates, strict=True)
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


def write_contact_sheet(path: Path, compared: Sequence[Compared], rows: Sequence[Row]) -> None:
    """Write all rows as one PNG with labels, marked as generated. Raises ConfigError, as for `generate --out`."""
    from flows.cli.results.images.contact_sheet import Sheet, draw_contact_sheet
    from flows.cli.results.images.files import write
    from tasks.images import encode_png

    cells: list[list[Image | None]] = [
        [decode_png(each.read(sample)) for each, sample in zip(compared, row.samples, strict=True)] for row in rows
    ]
    sheet = Sheet([each.name for each in compared], [f"{row.prompt}\nseed {row.seed}" for row in rows], cells)
    facts = {"Title": "likeness compare " + " ".join(each.name for each in compared)}
    write(path, encode_png(draw_contact_sheet(sheet), is_generated=True, facts=facts), option="--samples")
