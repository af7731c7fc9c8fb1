"""A person's approval: asked once, decided by form, command or timeout, and applied to what is trained on."""

import csv
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flows.runs import approval as module
from flows.runs.approval import Approval, Asked, ask_approval, make_form, read_approval, read_form, write_approval
from tasks.errors import ApprovalPending, SubjectRejected
from tasks.manifests.subject import SubjectSet
from tasks.services.store.local import LocalStore
from tasks.stage.digests import dump_signed
from tests.support.config import make_subject_config
from tests.support.subject import make_subject_set


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def subject() -> SubjectSet:
    return make_subject_set(num=3)


def ask(subject: SubjectSet, store: LocalStore, folder: Path, **settings: Any) -> Any:
    return ask_approval(subject, make_subject_config(approval="ask", **settings), store=store, folder=folder)


def test_a_run_without_a_decision_waits_where_no_ui_can_ask(
    subject: SubjectSet, store: LocalStore, tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(ApprovalPending, match="likeness approve"):
            ask(subject, store, tmp_path)


def test_an_approval_without_changes_leaves_the_configuration(
    subject: SubjectSet, store: LocalStore, tmp_path: Path
) -> None:
    write_approval(store, subject.stage_key, Approval(is_approved=True))
    assert ask(subject, store, tmp_path) == make_subject_config(approval="ask")


def test_rejected_photos_are_excluded_and_captions_are_written_whole(
    subject: SubjectSet, store: LocalStore, tmp_path: Path
) -> None:
    names = [image.source_name for image in subject.images]
    caption = 'on a "red" sofa, at night'
    write_approval(
        store, subject.stage_key, Approval(is_approved=True, rejected=(names[0],), captions={names[1]: caption})
    )
    decided = ask(subject, store, tmp_path, excluded_photos=("other.png",))
    assert decided.excluded_photos == ("other.png", names[0])
    rows = {row["photo"]: row for row in csv.DictReader(Path(decided.captions).read_text().splitlines())}
    assert (rows[names[1]]["surroundings"], rows[names[1]]["view"]) == (caption, "")
    assert rows[names[2]]["surroundings"] == subject.images[2].surroundings
    assert set(rows) == set(names)


def test_a_refusal_fails_the_run(subject: SubjectSet, store: LocalStore, tmp_path: Path) -> None:
    write_approval(store, subject.stage_key, Approval(is_approved=False))
    with pytest.raises(SubjectRejected, match="a person refused"):
        ask(subject, store, tmp_path)


@pytest.mark.parametrize("policy", ["approve", "cancel"])
def test_the_policy_decides_after_the_configured_hours(
    subject: SubjectSet, store: LocalStore, tmp_path: Path, policy: str
) -> None:
    asked = f"approvals/{subject.stage_key}-asked.json"
    store.put_bytes(asked, dump_signed(Asked(at=time.time() - 2 * 3600)))
    with pytest.raises(ApprovalPending):
        ask(subject, store, tmp_path, approval_hours=3.0, approval_on_timeout=policy)
    if policy == "approve":
        ask(subject, store, tmp_path, approval_hours=1.0, approval_on_timeout=policy)
        return
    with pytest.raises(SubjectRejected, match="within 1 hours"):
        ask(subject, store, tmp_path, approval_hours=1.0, approval_on_timeout=policy)
    with pytest.raises(ApprovalPending):  # a new run asks again
        ask(subject, store, tmp_path, approval_hours=1.0, approval_on_timeout=policy)


def test_damaged_records_ask_again(subject: SubjectSet, store: LocalStore, tmp_path: Path) -> None:
    for name in (f"{subject.stage_key}.json", f"{subject.stage_key}-asked.json"):
        store.put_bytes(f"{module.FOLDER}/{name}", b'{"is_approved": true}')
    assert read_approval(store, subject.stage_key) is None
    with pytest.raises(ApprovalPending):
        ask(subject, store, tmp_path, approval_on_timeout="approve")


def test_the_form_holds_each_photo_and_caption_and_is_read_back(subject: SubjectSet) -> None:
    form = make_form(subject)
    schema = form.model_json_schema()["properties"]
    assert [name for name in schema if name.startswith("photo_")] == ["photo_1", "photo_2", "photo_3"]
    assert schema["caption_2"]["default"] == f"{subject.images[1].surroundings}, {subject.images[1].view}"
    untouched = read_form(subject, form().model_dump())
    assert untouched == Approval(is_approved=True)
    filled = form.model_validate({"photo_1": "reject", "caption_2": " in the rain "})
    decided = read_form(subject, filled.model_dump())
    assert decided.rejected == (subject.images[0].source_name,)
    assert decided.captions == {subject.images[1].source_name: "in the rain"}
    assert not read_form(subject, form.model_validate({"decision": "cancel the run"}).model_dump()).is_approved
    for wrong in ({"photo_1": "maybe"}, {"caption_1": "x" * 301}):
        with pytest.raises(ValidationError):
            form.model_validate(wrong)
