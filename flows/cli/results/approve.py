"""`likeness approve`: a person's decision on the photos and captions of a run that waits for it."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from flows.cli.console import make_cell
from flows.cli.results.runs import find_run
from flows.cli.stack.submit import connect
from flows.runs.approval import Approval, EditedCaption, Question, fill_form, join_caption
from flows.runs.records import REQUEST, read_request, read_run
from tasks.errors import ConfigError, ServiceUnavailable, first_line
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
    if not read_request(folder).is_trusted:  # a suspended flow run of a deployment: Prefect's form holds the decision
        answer_form(output, UUID(summary.flow_run_id), fill_form(subject, approval))
        print("decided; the suspended flow run resumes")
        return 0
    Question(subject, run.config.subject, summary.config_digest, store, folder).write(approval)
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


def read_captions(path: Path) -> dict[str, EditedCaption]:
    """Return captions by photo, from a CSV of photo, surroundings and view as `likeness review` writes it."""
    from tasks.csv_files import read_rows

    rows = read_rows(path, ("photo", "surroundings", "view"), setting="--captions")
    return {row["photo"]: EditedCaption(surroundings=row["surroundings"], view=row["view"]) for _, row in rows}


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


def answer_form(output: Path, flow_run_id: UUID, answer: dict[str, str]) -> None:
    """Fill in the form of a suspended flow run.

    Raises:
        ConfigError: no server is known, or the run is not suspended any more.
        ServiceUnavailable: the server does not answer.

    """
    connect(output.absolute())
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        with get_client(sync_client=True) as client:
            result = client.resume_flow_run(flow_run_id, run_input=answer)
    except ObjectNotFound as error:
        raise ConfigError("the Prefect server does not know this run any more; submit it again") from error
    except httpx.HTTPError as error:
        raise ServiceUnavailable(
            f"the Prefect server did not answer: {first_line(error)}; nothing was decided"
        ) from error
    if result.status != "ACCEPT":
        reason = getattr(result.details, "reason", None) or result.status
        raise ConfigError(f"the flow run can't be resumed: {reason}; submit it again")
