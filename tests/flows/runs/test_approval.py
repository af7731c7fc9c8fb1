"""A person's approval: asked once, decided by form, command or timeout, and applied to what is trained on."""

import csv
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flows.runs.approval import (
    Approval,
    Asked,
    EditedCaption,
    Question,
    ask_approval,
    fill_form,
    make_form,
    read_form,
)
from tasks.errors import ApprovalPending, SubjectRejected
from tasks.manifests.subject import RejectedImage, SubjectSet
from tasks.services.store.local import LocalStore
from tasks.stage.digests import dump_signed
from tests.support.config import make_subject_config
from tests.support.subject import make_subject_set


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def subject() -> SubjectSet:
    twin = RejectedImage(source_name="twin.png", source_sha256="0" * 64, reason="same as 0.png")
    return make_subject_set(num=3).model_copy(update={"rejected": (twin,)})


def put_question(subject: SubjectSet, store: LocalStore, folder: Path, **settings: Any) -> Question:
    return Question(subject, make_subject_config(approval="ask", **settings), "d" * 16, store, folder)


def ask(subject: SubjectSet, store: LocalStore, folder: Path, **settings: Any) -> Any:
    return ask_approval(put_question(subject, store, folder, **settings))


def decide(subject: SubjectSet, store: LocalStore, approval: Approval) -> None:
    put_question(subject, store, Path()).write(approval)


def test_a_run_without_a_decision_waits_where_no_ui_can_ask(
    subject: SubjectSet, store: LocalStore, tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(ApprovalPending, match="likeness approve"):
            ask(subject, store, tmp_path)


def test_an_approval_without_changes_leaves_the_configuration(
    subject: SubjectSet, store: LocalStore, tmp_path: Path
) -> None:
    decide(subject, store, Approval(is_approved=True))
    assert ask(subject, store, tmp_path) == make_subject_config(approval="ask")


def test_rejected_photos_are_excluded_and_captions_are_written_whole(
    subject: SubjectSet, store: LocalStore, tmp_path: Path
) -> None:
    names = [image.source_name for image in subject.images]
    caption = 'on a "red" sofa, at night'
    edited = {names[1]: EditedCaption(surroundings=caption, view="")}
    decide(subject, store, Approval(is_approved=True, rejected=(names[0],), captions=edited))
    decided = ask(subject, store, tmp_path, excluded_photos=("other.png",))
    # The photos that QC left out too: with the rejected one gone, its near-duplicate would be accepted.
    assert decided.excluded_photos == ("other.png", names[0], "twin.png")
    rows = {row["photo"]: row for row in csv.DictReader(Path(decided.captions).read_text().splitlines())}
    assert (rows[names[1]]["surroundings"], rows[names[1]]["view"]) == (caption, "")
    assert set(rows) == {names[1]}  # the others keep the captions, and crops, of their inspection


def test_a_refusal_fails_the_run(subject: SubjectSet, store: LocalStore, tmp_path: Path) -> None:
    decide(subject, store, Approval(is_approved=False))
    with pytest.raises(SubjectRejected, match="a person refused"):
        ask(subject, store, tmp_path)
    with pytest.raises(ApprovalPending):  # another run of these photos asks again
        ask(subject, store, tmp_path)


@pytest.mark.parametrize("policy", ["approve", "cancel"])
def test_the_policy_decides_after_the_configured_hours(
    subject: SubjectSet, store: LocalStore, tmp_path: Path, policy: str
) -> None:
    asked = f"{put_question(subject, store, tmp_path).key}-asked.json"
    store.put_bytes(asked, dump_signed(Asked(at=time.time() - 2 * 3600)))
    with pytest.raises(ApprovalPending):
        ask(subject, store, tmp_path, approval_hours=3.0, approval_on_timeout=policy)
    if policy == "approve":
        ask(subject, store, tmp_path, approval_hours=1.0, approval_on_timeout=policy)
        return
    with pytest.raises(SubjectRejected, match="subject.approval_hours=1"):
        ask(subject, store, tmp_path, approval_hours=1.0, approval_on_timeout=policy)
    with pytest.raises(ApprovalPending):  # a new run asks again
        ask(subject, store, tmp_path, approval_hours=1.0, approval_on_timeout=policy)


def test_damaged_records_ask_again(subject: SubjectSet, store: LocalStore, tmp_path: Path) -> None:
    question = put_question(subject, store, tmp_path)
    for name in (f"{question.key}.json", f"{question.key}-asked.json"):
        store.put_bytes(name, b'{"is_approved": true}')
    assert question.read() is None
    with pytest.raises(ApprovalPending):
        ask(subject, store, tmp_path, approval_on_timeout="approve")


def test_a_decision_belongs_to_one_run(subject: SubjectSet, store: LocalStore, tmp_path: Path) -> None:
    decide(subject, store, Approval(is_approved=False))
    other = Question(subject, make_subject_config(approval="ask"), "e" * 16, store, tmp_path)
    with pytest.raises(ApprovalPending):
        ask_approval(other)


def test_captions_of_the_configured_file_are_kept(subject: SubjectSet, store: LocalStore, tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    own.write_text("photo,surroundings,view\n0.png,on ice,\n1.png,on snow,from below\n")
    edited = {"1.png": EditedCaption(surroundings="", view="")}
    decide(subject, store, Approval(is_approved=True, captions=edited))
    decided = ask(subject, store, tmp_path, captions=str(own))
    rows = list(csv.reader(Path(decided.captions).read_text().splitlines()))
    assert rows[1:] == [["0.png", "on ice", ""], ["1.png", "", ""]]


def test_the_form_holds_each_photo_and_caption_and_is_read_back(subject: SubjectSet) -> None:
    form = make_form(subject)
    schema = form.model_json_schema()["properties"]
    assert [name for name in schema if name.startswith("photo_")] == ["photo_1", "photo_2", "photo_3"]
    assert schema["surroundings_2"]["default"] == subject.images[1].surroundings
    untouched = read_form(subject, form().model_dump())
    assert untouched == Approval(is_approved=True)
    filled = form.model_validate({"photo_1": "reject", "surroundings_2": " in the rain ", "view_2": ""})
    decided = read_form(subject, filled.model_dump())
    assert decided.rejected == (subject.images[0].source_name,)
    edited = EditedCaption(surroundings="in the rain", view="")
    assert decided.captions == {subject.images[1].source_name: edited}
    assert not read_form(subject, form.model_validate({"decision": "cancel the run"}).model_dump()).is_approved
    # What `likeness approve` decides is what it fills in.
    for decision in (decided, untouched, Approval(is_approved=False)):
        assert read_form(subject, form.model_validate(fill_form(subject, decision)).model_dump()) == decision
    for wrong in ({"photo_1": "maybe"}, {"view_1": "x" * 151}):
        with pytest.raises(ValidationError):
            form.model_validate(wrong)
