"""A person's approval of photos and captions, before training: asked for in Prefect's UI or by `likeness approve`.

The decision lies in the store, by the key of the subject stage: whoever executes the run finds it there.
"""

import csv
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, create_model

from tasks.errors import ApprovalPending, ArtifactCorrupt, SubjectRejected
from tasks.manifests.subject import InstanceImage, SubjectSet
from tasks.services.store.base import Store
from tasks.stage.digests import dump_signed, load_signed
from tasks.stage.files import write_atomic
from tasks.subject.config import SubjectConfig

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.input import RunInput

FOLDER = "approvals"
MAX_CAPTION = 300


class Approval(BaseModel):
    """A person's decision on the photos of a run."""

    is_approved: bool
    rejected: tuple[str, ...] = ()
    """Names of photos that are not used."""
    captions: dict[str, str] = Field(default_factory=dict)
    """Changed captions, by photo: what varies, without the subject."""


class Asked(BaseModel):
    """When a person was first asked."""

    at: float
    """Unix time in seconds."""


def read_approval(store: Store, key: str) -> Approval | None:
    """Return the decision; None where there is none, or a damaged one, which is asked for again."""
    data = store.find_bytes(f"{FOLDER}/{key}.json")
    try:
        return load_signed(Approval, data) if data is not None else None
    except ArtifactCorrupt:
        return None


def write_approval(store: Store, key: str, approval: Approval) -> None:
    """Store a decision; a later one replaces it."""
    store.put_bytes(f"{FOLDER}/{key}.json", dump_signed(approval))


def ask_approval(subject: SubjectSet, config: SubjectConfig, *, store: Store, folder: Path) -> SubjectConfig:
    """Return the configuration with the person's decision; suspend the run where there is none yet.

    Args:
        subject: the photos and captions to decide on.
        config: how they were made.
        store: where the decision lies.
        folder: the run's, for the captions that were changed.

    Raises:
        ApprovalPending: nobody has decided; a flow run of a deployment is suspended instead (Prefect's Pause).
        SubjectRejected: a person refused the photos, or nobody decided in time.

    """
    approval = read_approval(store, subject.stage_key) or decide_late(store, subject.stage_key, config)
    if approval is None:
        approval = ask_in_ui(subject, hours=config.approval_hours)
        write_approval(store, subject.stage_key, approval)
    if not approval.is_approved:
        raise SubjectRejected("a person refused the photos; choose others")
    return apply_approval(approval, subject, config, folder=folder)


def decide_late(store: Store, key: str, config: SubjectConfig) -> Approval | None:
    """Return the decision of the timeout's policy; None where there is time left. Raises SubjectRejected by policy."""
    name = f"{FOLDER}/{key}-asked.json"
    store.put_if_absent(name, dump_signed(Asked(at=time.time())))
    try:
        asked = load_signed(Asked, store.find_bytes(name) or b"")
    except ArtifactCorrupt:
        store.put_bytes(name, dump_signed(Asked(at=time.time())))
        return None
    if time.time() - asked.at < config.approval_hours * 3600:
        return None
    if config.approval_on_timeout == "approve":
        return Approval(is_approved=True)
    store.delete(name)  # a new run asks again
    raise SubjectRejected(f"nobody approved the photos within {config.approval_hours:g} hours; run again to be asked")


def ask_in_ui(subject: SubjectSet, *, hours: float) -> Approval:
    """Suspend the flow run until the form in Prefect's UI is filled in. Raises ApprovalPending where there is no UI."""
    from prefect.context import FlowRunContext
    from prefect.flow_runs import suspend_flow_run

    context = FlowRunContext.get()
    run: FlowRun | None = context.flow_run if context else None
    # A subflow has no deployment of its own, and can't be suspended.
    if run is None or run.deployment_id is None:
        raise ApprovalPending("the photos wait for approval: `likeness approve` shows them and takes the decision")
    show_photos(subject)
    form = make_form(subject)
    described = form.with_initial_data(
        description=f"{len(subject.images)} photos of one {subject.class_noun}, shown in the artifact `photos`. "
        "Refused photos are not trained on; a caption says what varies, never the subject itself."
    )
    answer = suspend_flow_run(wait_for_input=described, timeout=int(hours * 3600), key=subject.stage_key[:16])
    return read_form(subject, answer.model_dump())


def make_form(subject: SubjectSet) -> "type[RunInput]":
    """Return the form: accept or reject, and the caption, of each photo."""
    from prefect.input import RunInput

    fields: dict[str, tuple[object, object]] = {
        "decision": (Literal["approve", "cancel the run"], Field("approve", title="Decision"))
    }
    for number, image in enumerate(subject.images, 1):
        choice = Field("accept", title=f"Photo {number}: {image.source_name}")
        fields[f"photo_{number}"] = (Literal["accept", "reject"], choice)
        text = Field(join_caption(image), title=f"Caption {number}", max_length=MAX_CAPTION)
        fields[f"caption_{number}"] = (str, text)
    # pydantic types the fields by keyword, which names made at run time can't satisfy.
    return create_model("PhotoApproval", __base__=RunInput, **fields)  # type: ignore[call-overload,no-any-return]


def read_form(subject: SubjectSet, answer: dict[str, object]) -> Approval:
    """Return the decision in a filled form."""
    rejected, captions = [], {}
    for number, image in enumerate(subject.images, 1):
        if answer.get(f"photo_{number}") == "reject":
            rejected.append(image.source_name)
        caption = str(answer.get(f"caption_{number}", "")).strip()
        if caption and caption != join_caption(image):
            captions[image.source_name] = caption
    is_approved = answer.get("decision") == "approve"
    return Approval(is_approved=is_approved, rejected=tuple(rejected), captions=captions)


def join_caption(image: InstanceImage) -> str:
    """Return a photo's caption as one text."""
    return ", ".join(filter(None, (image.surroundings, image.view)))[:MAX_CAPTION]


def show_photos(subject: SubjectSet) -> None:
    """List the photos with captions in the UI."""
    from prefect.artifacts import create_table_artifact

    rows = [
        {"photo": number, "file": image.source_name, "caption": join_caption(image), "QC": "accepted"}
        for number, image in enumerate(subject.images, 1)
    ]
    aside = [*subject.quarantined, *subject.rejected]
    rows += [{"photo": "", "file": each.source_name, "caption": "", "QC": each.reason} for each in aside]
    create_table_artifact(table=rows, key="photos", description="Photos that wait for approval")


def apply_approval(approval: Approval, subject: SubjectSet, config: SubjectConfig, *, folder: Path) -> SubjectConfig:
    """Return the configuration with the rejected photos excluded and the changed captions in a file."""
    if not approval.rejected and not approval.captions:
        return config
    changes: dict[str, object] = {"excluded_photos": (*config.excluded_photos, *approval.rejected)}
    if approval.captions:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(("photo", "surroundings", "view"))
        for image in subject.images:
            caption = approval.captions.get(image.source_name)
            # All captions: a file replaces the configured one whole.
            writer.writerow((image.source_name, *((caption, "") if caption else (image.surroundings, image.view))))
        path = folder / "captions-approved.csv"
        write_atomic(path, text.getvalue())
        changes["captions"] = str(path)
    return config.model_copy(update=changes)
