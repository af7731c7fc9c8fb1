"""Pending runs: suspended ones, and interrupted ones whose batch job is still active."""

from dataclasses import dataclass, field
from pathlib import Path

from flows.runs.approval import Question
from flows.runs.records import REQUEST, list_run_folders, read_request, read_run, read_summary
from tasks.errors import ApprovalPending, ArtifactCorrupt, LikenessError
from tasks.manifests.run_summary import RunSummary
from tasks.manifests.subject import SubjectSet
from tasks.stage.digests import load_lines

JOB_LOG = "jobs.jsonl"
INTERRUPTED = ("failed", "cancelled", "killed", "damaged")
"""Statuses of runs that may have an uncollected job."""


@dataclass
class PendingReport:
    """Outcome of resuming pending runs, by run folder name."""

    finished: list[RunSummary] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0: all are done; 11: some are still pending; 1: some failed."""
        if self.failed:
            return 1
        return 11 if self.waiting else 0

    def describe(self) -> str:
        """Return how many runs ended how."""
        return f"{len(self.finished)} finished, {len(self.waiting)} still pending, {len(self.failed)} failed"


def list_pending(output: Path) -> list[list[Path]]:
    """Return the folders of pending runs, oldest first, grouped by equal requests."""
    groups: dict[str, list[Path]] = {}
    for folder in list_run_folders(output):
        summary = read_summary(folder)
        status = summary.status
        if summary.error is not None and summary.error.kind == ApprovalPending.__name__ and not is_decided(folder):
            continue  # until a person has decided, another attempt could only wait as well
        if status == "pending" or (status in INTERRUPTED and has_live_job(folder)):
            # Equal requests have equal keys: resuming one run collects the batch job for all of them.
            groups.setdefault((folder / REQUEST).read_text(errors="replace"), []).append(folder)
    return list(groups.values())


def is_decided(folder: Path) -> bool:
    """Whether a person has decided on the photos of a run at a terminal, or had the configured time.

    A suspended flow run of a deployment is resumed by Prefect, never from here.
    """
    from tasks.services.store.open import open_store
    from tasks.stage.cache import find_manifest

    try:
        if not read_request(folder).is_trusted:
            return False
        run = read_run(folder)
        store = open_store(run.config.store)
        subject = find_manifest(store, SubjectSet, stage="subject", key=run.summary.stages["subject"].key)
        if subject is None:
            return True  # it is prepared and asked for again
        question = Question(subject, run.config.subject, run.summary.config_digest, store, folder)
        return question.read() is not None or question.is_expired()
    except (LikenessError, OSError, ValueError, KeyError):
        return False


def find_readable(groups: list[list[Path]]) -> Path:
    """Return the first run whose request can be read; else the first, whose error says so."""
    for folders in groups:
        try:
            read_request(folders[0])
        except ArtifactCorrupt:
            continue
        return folders[0]
    return groups[0][0]


def list_job_keys(folder: Path) -> list[str]:
    """Return the store keys of the batch jobs that a run made or waited for, each once."""
    path = folder / JOB_LOG
    rows = load_lines(path.read_bytes()) if path.is_file() else iter(())
    keys = [row.get("state_key") for row in rows if row is not None]
    return list(dict.fromkeys(key for key in keys if isinstance(key, str)))


def has_live_job(folder: Path) -> bool:
    """Whether a run made a batch job that is not collected and whose lease no live process holds."""
    from tasks.services.llm.batch.job import find_state
    from tasks.services.store.lease import find_holder
    from tasks.services.store.open import open_store

    keys = list_job_keys(folder)
    if not keys:
        return False
    try:
        store = open_store(read_run(folder).config.store)
        states = [state for key in keys if (state := find_state(store, key)) is not None]
    except (LikenessError, OSError, ValueError):  # a missing store holds no job
        return False
    # A job with a fresh lease is polled by a live process; resuming its run here would compete with that one.
    live = [state for state in states if not state.is_collected]
    holders = [find_holder(store, state.lease_name) for state in live]
    return bool(live) and not any(holder and not holder[1].is_stale() for holder in holders)
