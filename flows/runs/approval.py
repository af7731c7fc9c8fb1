"""A person's approval of photos and captions, before training: asked for in Prefect's UI or by `likeness approve`.

In a deployment the form holds the decision. Elsewhere it lies in the store, where `likeness approve` puts it and the
run that resumes finds it.
"""

import csv
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, create_model

from tasks.errors import ApprovalPending, ArtifactCorrupt, ConfigError, SubjectRejected
from tasks.manifests.subject import InstanceImage, SubjectSet
from tasks.services.store.base import Store
from tasks.stage.digests import dump_signed, load_signed
from tasks.stage.files import write_atomic
from tasks.subject.config import SubjectConfig

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.input import RunInput

FOLDER = "approvals"
MAX_PHRASE = 150


class EditedCaption(BaseModel):
    """A caption that a person changed: what varies between photos, never the subject."""

    surroundings: str
    view: str


class Approval(BaseModel):
    """A person's decision on the photos of a run."""

    is_approved: bool
    rejected: tuple[str, ...] = ()
    """Names of photos that are not used."""
    captions: dict[str, EditedCaption] = Field(default_factory=dict)
    """Changed captions, by photo."""


class Asked(BaseModel):
    """When a person was first asked."""

    at: float
    """Unix time in seconds."""


@dataclass(frozen=True)
class Question:
    """The photos and captions of a run, to be decided on.

    The decision belongs to this run and those that resume it, not to everybody with the same photos.
    """

    subject: SubjectSet
    config: SubjectConfig
    run_digest: str
    """Of the whole configuration: a resumed run has the same."""
    store: Store
    folder: Path
    """The run's, where changed captions are written."""

    @property
    def key(self) -> str:
        """Prefix of the records in the store."""
        return f"{FOLDER}/{self.subject.stage_key}-{self.run_digest[:16]}"

    def read(self) -> Approval | None:
        """Return the decision; None where there is none, or a damaged one, which is asked for again."""
        data = self.store.find_bytes(f"{self.key}.json")
        try:
            return load_signed(Approval, data) if data is not None else None
        except ArtifactCorrupt:
            return None

    def write(self, approval: Approval) -> None:
        """Store a decision; a later one replaces it."""
        self.store.put_bytes(f"{self.key}.json", dump_signed(approval))

    def forget(self) -> None:
        """Forget decision and time: whoever runs these photos again is asked again."""
        for name in (f"{self.key}.json", f"{self.key}-asked.json"):
            self.store.delete(name)

    def find_asked(self) -> float:
        """Return when a person was first asked, in Unix seconds; now, the first time."""
        name = f"{self.key}-asked.json"
        now = Asked(at=time.time())
        if self.store.put_if_absent(name, dump_signed(now)):
            return now.at
        try:
            return load_signed(Asked, self.store.find_bytes(name) or b"").at
        except ArtifactCorrupt:
            self.store.put_bytes(name, dump_signed(now))
            return now.at

    def is_expired(self) -> bool:
        """Whether a person had the configured time and did not decide."""
        return time.time() - self.find_asked() >= self.config.approval_hours * 3600


def ask_approval(question: Question) -> SubjectConfig:
    """Return the configuration with the person's decision; suspend the run where there is none yet.

    Raises:
        ApprovalPending: nobody has decided; a flow run of a deployment is suspended instead (Prefect's Pause).
        SubjectRejected: a person refused the photos, or nobody decided in time.

    """
    config = question.config
    approval = ask_in_ui(question.subject, hours=config.approval_hours) if can_suspend() else question.read()
    if approval is None:
        approval = decide_late(question)
    if not approval.is_approved:
        question.forget()
        raise SubjectRejected("a person refused the photos; choose others")
    return apply_approval(approval, question)


def decide_late(question: Question) -> Approval:
    """Return the decision of the timeout's policy.

    Raises:
        ApprovalPending: there is time left.
        SubjectRejected: the policy is to cancel.

    """
    if not question.is_expired():
        raise ApprovalPending("the photos wait for approval: `likeness approve` shows them and takes the decision")
    if question.config.approval_on_timeout == "approve":
        return Approval(is_approved=True)
    question.forget()
    hours = question.config.approval_hours
    raise SubjectRejected(
        f"nobody approved the photos in time (subject.approval_hours={hours:g}); run again to be asked"
    )


def can_suspend() -> bool:
    """Whether this is a flow run of a deployment, which Prefect can suspend; a subflow has no deployment of its own."""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    run: FlowRun | None = context.flow_run if context else None
    return run is not None and run.deployment_id is not None


def check_policy(config: SubjectConfig) -> None:
    """Raise ConfigError for a policy that nothing would carry out: Prefect fails a flow run that nobody resumes."""
    if config.approval == "ask" and config.approval_on_timeout == "approve" and can_suspend():
        raise ConfigError(
            "subject.approval_on_timeout=approve works at a terminal alone: Prefect ends a suspended run at its timeout"
        )


def ask_in_ui(subject: SubjectSet, *, hours: float) -> Approval:
    """Suspend the flow run until the form in Prefect's UI is filled in, and return what it says."""
    from prefect.flow_runs import suspend_flow_run

    form = make_form(subject).with_initial_data(
        description=f"{len(subject.images)} photos of one {subject.class_noun}, listed in the artifact `photos`. "
        "Rejected photos are not trained on. A caption says what varies between photos, never the subject itself; "
        "twelve words of each phrase are kept."
    )
    show_photos(subject)
    # The key makes it the same question when the run is resumed: then its answer is returned.
    answer = suspend_flow_run(wait_for_input=form, timeout=int(hours * 3600), key=subject.stage_key[:16])
    return read_form(subject, answer.model_dump())


def make_form(subject: SubjectSet) -> "type[RunInput]":
    """Return the form: accept or reject, and the caption's two phrases, of each photo."""
    from prefect.input import RunInput

    fields: dict[str, tuple[object, object]] = {
        "decision": (Literal["approve", "cancel the run"], Field("approve", title="Decision"))
    }
    for number, image in enumerate(subject.images, 1):
        choice = Field("accept", title=f"Photo {number}: {image.source_name}")
        fields[f"photo_{number}"] = (Literal["accept", "reject"], choice)
        for name, title in (("surroundings", "where it is"), ("view", "framing or pose")):
            text = Field(getattr(image, name)[:MAX_PHRASE], title=f"Photo {number}: {title}", max_length=MAX_PHRASE)
            fields[f"{name}_{number}"] = (str, text)
    # pydantic types the fields by keyword, which names made at run time can't satisfy.
    return create_model("PhotoApproval", __base__=RunInput, **fields)  # type: ignore[call-overload,no-any-return]


def read_form(subject: SubjectSet, answer: dict[str, object]) -> Approval:
    """Return the decision in a filled form."""
    rejected, captions = [], {}
    for number, image in enumerate(subject.images, 1):
        if answer.get(f"photo_{number}") == "reject":
            rejected.append(image.source_name)
        shown = {name: getattr(image, name)[:MAX_PHRASE] for name in ("surroundings", "view")}
        typed = {name: str(answer.get(f"{name}_{number}", text)).strip() for name, text in shown.items()}
        if typed != shown:
            captions[image.source_name] = EditedCaption(**typed)
    is_approved = answer.get("decision") == "approve"
    return Approval(is_approved=is_approved, rejected=tuple(rejected), captions=captions)


def fill_form(subject: SubjectSet, approval: Approval) -> dict[str, str]:
    """Return the form's answer for a decision that was taken elsewhere."""
    answer = {"decision": "approve" if approval.is_approved else "cancel the run"}
    for number, image in enumerate(subject.images, 1):
        answer[f"photo_{number}"] = "reject" if image.source_name in approval.rejected else "accept"
        caption = approval.captions.get(image.source_name)
        if caption is not None:
            answer |= {f"surroundings_{number}": caption.surroundings, f"view_{number}": caption.view}
    return answer


def join_caption(image: InstanceImage) -> str:
    """Return a photo's caption as one text."""
    return ", ".join(filter(None, (image.surroundings, image.view)))


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


def apply_approval(approval: Approval, question: Question) -> SubjectConfig:
    """Return the configuration with the rejected photos excluded and the changed captions in a file."""
    config, subject = question.config, question.subject
    if not approval.rejected and not approval.captions:
        return config
    # Those that QC left out as well: without the rejected photo, its near-duplicate, which nobody saw, would move up.
    aside = [each.source_name for each in (*subject.rejected, *subject.quarantined)]
    excluded = dict.fromkeys((*config.excluded_photos, *approval.rejected, *aside))
    changes: dict[str, object] = {"excluded_photos": tuple(excluded)}
    if approval.captions:
        path = question.folder / "captions-approved.csv"
        write_captions(path, approval, question)
        changes["captions"] = str(path)
    return config.model_copy(update=changes)


def write_captions(path: Path, approval: Approval, question: Question) -> None:
    """Write the changed captions, and those of the configured file, which this one replaces."""
    from tasks.subject.captions.captioning import read_captions

    names = {image.source_name for image in question.subject.images}
    aside = {each.source_name for each in (*question.subject.rejected, *question.subject.quarantined)}
    rows = {name: (row.surroundings, row.view) for name, row in read_captions(question.config, names | aside).items()}
    rows |= {name: (row.surroundings, row.view) for name, row in approval.captions.items()}
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("photo", "surroundings", "view"))
    writer.writerows((name, *caption) for name, caption in rows.items())
    write_atomic(path, text.getvalue())
