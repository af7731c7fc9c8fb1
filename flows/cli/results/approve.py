"""`likeness approve`: a person's decision on the photos and captions of a run that waits for it."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from flows.cli.console import make_cell
from flows.cli.results.runs import find_run
from flows.cli.stack.stack import find_api_url
from flows.runs.approval import Approval, join_caption, write_approval
from flows.runs.records import REQUEST, read_run
from tasks.errors import ConfigError
from tasks.manifests.subject import SubjectSet
from tasks.redaction import clean_text, show_value
from tasks.services.store.open import open_store
from tasks.stage.cache import find_manifest


@dataclass(frozen=True)
class Decision:
    """What was typed."""

    rejected: Sequence[str] = ()
    captions: Path | None = None
    is_refused: bool = False
    is_confirmed: bool = False
    """Whether no question is asked."""


def approve(output: Path, name: str, decision: Decision, *, read: Callable[[str], str] = input) -> int:
    """Show the photos, take the decision, and resume the run.

    Raises:
        ConfigError: the run waits for no approval, or a photo is unknown.

    """
    folder = find_run(output, name, record=REQUEST)
    run = read_run(folder)
    summary = run.summary
    if summary.status != "pending" or summary.error is None or summary.error.kind != "ApprovalPending":
        raise ConfigError(f"run {folder.name} waits for no approval ({summary.status}); `likeness runs` lists those")
    store = open_store(run.config.store)
    subject = find_manifest(store, SubjectSet, stage="subject", key=summary.stages["subject"].key)
    if subject is None:
        raise ConfigError(f"the photos of run {folder.name} are missing from the store; `likeness resume` it")
    show_photos(subject)
    approval = make_approval(subject, decision)
    if not decision.is_confirmed and not confirm(approval, read):
        print("nothing was decided", file=sys.stderr)
        return 1
    write_approval(store, subject.stage_key, approval)
    if summary.flow_run_id and resume_in_prefect(output, UUID(summary.flow_run_id)):
        print("decided; the suspended flow run goes on")
        return 0
    from flows.cli.run.resume import resume

    return resume(output, folder.name)


def make_approval(subject: SubjectSet, decision: Decision) -> Approval:
    """Return the decision. Raises ConfigError for a photo that there isn't."""
    names = {image.source_name for image in subject.images}
    captions = read_captions(decision.captions) if decision.captions else {}
    for photo in (*decision.rejected, *captions):
        if photo not in names:
            raise ConfigError(f"there is no photo {show_value(photo)}; there are: {', '.join(sorted(names))}")
    return Approval(is_approved=not decision.is_refused, rejected=tuple(decision.rejected), captions=captions)


def read_captions(path: Path) -> dict[str, str]:
    """Return captions by photo, from a CSV of photo, surroundings and view as `likeness review` writes it."""
    from tasks.csv_files import read_rows

    rows = read_rows(path, ("photo", "surroundings", "view"), setting="--captions")
    return {row["photo"]: ", ".join(filter(None, (row["surroundings"], row["view"]))) for _, row in rows}


def show_photos(subject: SubjectSet) -> None:
    """Print photos with captions, and those that QC left out."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for title in ("photo", "caption", "QC"):
        table.add_column(title)
    for image in subject.images:
        table.add_row(*map(make_cell, (image.source_name, join_caption(image) or "-", "accepted")))
    for each in (*subject.quarantined, *subject.rejected):
        table.add_row(*map(make_cell, (each.source_name, "-", each.reason)))
    Console(width=160).print(table)


def confirm(approval: Approval, read: Callable[[str], str]) -> bool:
    """Ask for a yes; the end of input is a no."""
    what = "Train on these photos" if approval.is_approved else "Refuse all photos and fail the run"
    if approval.rejected:
        what += f" without {', '.join(approval.rejected)}"
    with contextlib.suppress(EOFError):
        return read(clean_text(f"{what}? [y/N] ")).strip().lower() in ("y", "yes")
    return False


def resume_in_prefect(output: Path, flow_run_id: UUID) -> bool:
    """Resume the suspended flow run of a deployment; return whether there was one."""
    url = os.environ.get("PREFECT_API_URL") or find_api_url(output.absolute())
    if not url:
        return False
    os.environ["PREFECT_API_URL"] = url
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            run = client.read_flow_run(flow_run_id)
        except ObjectNotFound:
            return False
        if run.state is None or not run.state.is_paused():
            return False
        # The form's defaults; the decision in the store takes precedence over them.
        client.resume_flow_run(flow_run_id, run_input={})
    return True
