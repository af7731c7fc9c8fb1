"""What became of each subject: one small record per subject in the store, by the digest of request and photos."""

from typing import Literal

from pydantic import BaseModel, Field

from tasks.errors import ArtifactCorrupt
from tasks.manifests.run_summary import RunSummary
from tasks.services.store.base import Store
from tasks.stage.digests import dump_signed, load_signed

FOLDER = "subject-runs"
SubjectStatus = Literal["finished", "unchanged", "submitted", "pending", "failed", "cancelled", "incomplete", "refused"]
"""`unchanged`: finished before, and neither its request nor its photos changed since."""


class SubjectRun(BaseModel):
    """The newest run of a subject."""

    status: Literal["finished", "submitted", "failed", "cancelled"]
    attempt: int = Field(1, ge=1)
    flow_run_id: str = ""
    """The submitted flow run; empty where the run was executed here."""
    run_id: str = ""
    reason: str = ""


class SubjectOutcome(BaseModel):
    """One row of the result."""

    name: str
    status: SubjectStatus
    reason: str = ""
    run_id: str = ""
    summary: RunSummary | None = None


class ManyOutcome(BaseModel):
    """What became of all subjects."""

    name: str
    outcomes: list[SubjectOutcome]
    folder: str
    """Where `index.html` and `table.csv` are."""

    def count(self, *statuses: SubjectStatus) -> int:
        """Return how many subjects have one of the statuses."""
        return sum(outcome.status in statuses for outcome in self.outcomes)


def read_record(store: Store, key: str) -> SubjectRun | None:
    """Return the record of a subject; None where there is none, or a damaged one, so that it is run again."""
    data = store.find_bytes(f"{FOLDER}/{key}.json")
    try:
        return load_signed(SubjectRun, data) if data is not None else None
    except ArtifactCorrupt:  # its stages are cached: running again costs seconds
        return None


def write_record(store: Store, key: str, record: SubjectRun) -> None:
    """Replace the record of a subject."""
    store.put_bytes(f"{FOLDER}/{key}.json", dump_signed(record))


def next_attempt(record: SubjectRun | None) -> int:
    """Return the number of a subject's next run."""
    return record.attempt + 1 if record else 1
