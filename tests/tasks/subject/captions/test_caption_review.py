"""The reviewer's tools: captions change by a person's yes only, and every version is kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.manifests.subject import SubjectSet
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tasks.subject.captions.caption_review import (
    CaptionVersions,
    build_system_prompt,
    describe_subject,
    list_tools,
    open_caption_versions,
)
from tasks.subject.captions.captioning import Caption, PhotoAnnotation, read_captions
from tasks.subject.photos.ingest import check_photos
from tasks.subject.selection import select_photos
from tasks.subject.subject_profile import Overview
from tests.support.config import make_subject_config
from tests.support.subject import INSPECTION, PROFILE
from tests.support.tiny import draw_photos


@pytest.fixture
def subject(tmp_path: Path, store: LocalStore) -> SubjectSet:
    """Four photos, the last quarantined."""
    draw_photos(tmp_path / "in", num=4, size=256)
    config = make_subject_config(source=str(tmp_path / "in"))
    photos = check_photos(config, store).accepted
    described = {photo.sha256: PhotoAnnotation(INSPECTION, Caption(surroundings="at sea", view="")) for photo in photos}
    described[photos[3].sha256] = PhotoAnnotation(problem="the model refused")
    folder = StageFolder(store, "subject", "k")
    found = select_photos(folder, photos, described, config=config, overview=Overview(PROFILE))
    return folder.finish(
        SubjectSet(
            **folder.head(1, counts={}),
            class_noun="fish",
            identifier_token="sks",
            images=tuple(found.images),
            rejected=(),
            quarantined=tuple(found.quarantined),
            traits=tuple(found.traits),
        )
    )


class Person:
    """Answers every question alike and remembers them."""

    def __init__(self, answer: bool) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def __call__(self, question: str) -> bool:
        self.asked.append(question)
        return self.answer


def call(
    subject: SubjectSet, versions: CaptionVersions, store: LocalStore, person: Person, name: str, **arguments: str
) -> dict[str, Any]:
    config = make_subject_config()
    tools = {tool.name: tool for tool in list_tools(subject, versions, config, store=store, confirm=person)}
    result = tools[name].call(json.dumps(arguments))
    return {**result.values, "picture": result.image}


def test_a_confirmed_caption_change_writes_a_new_version_file(
    subject: SubjectSet, store: LocalStore, tmp_path: Path
) -> None:
    config = make_subject_config()
    versions, yes = open_caption_versions(tmp_path, config, subject), Person(True)
    for surroundings in ("on a red table", "on a green table"):
        done = call(
            subject, versions, store, yes, "apply_caption", photo="photo-0.png", surroundings=surroundings, view=""
        )
    assert done["version"] == 2
    assert 'train with "a photo of sks fish on a green table"' in yes.asked[-1]
    call(
        subject, versions, store, yes, "apply_caption", photo="photo-3.png", surroundings="in a bowl", view="from above"
    )
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == [f"captions-{n}.csv" for n in (1, 2, 3)]
    read = read_captions(config.model_copy(update={"captions": str(versions.path)}), {"photo-0.png", "photo-3.png"})
    assert read["photo-0.png"].surroundings == "on a green table"
    assert read["photo-3.png"].view == "from above"
    again = open_caption_versions(tmp_path, config, subject)
    assert (again.version, again.rows) == (3, read)
    rows = {name: (caption, found) for name, caption, found in describe_subject(subject, again)}
    assert rows["photo-0.png"][0] == "on a green table"
    assert rows["photo-1.png"][0] == "at sea"
    assert rows["photo-3.png"] == ("in a bowl, from above", "quarantined: no usable reply (the model refused)")


def test_captions_stay_unchanged_without_confirmation_or_for_unknown_photos(
    subject: SubjectSet, store: LocalStore, tmp_path: Path
) -> None:
    versions = CaptionVersions(tmp_path, {})
    no = call(
        subject, versions, store, Person(False), "apply_caption", photo="photo-0.png", surroundings="here", view=""
    )
    assert no["applied"] is False
    other = call(subject, versions, store, Person(True), "apply_caption", photo="../x", surroundings="here", view="")
    assert other["error"].startswith("there is no photo")
    assert list(tmp_path.glob("captions-*")) == []


def test_the_confirmation_prompt_names_invariant_traits_in_the_caption(
    subject: SubjectSet, store: LocalStore, tmp_path: Path
) -> None:
    person = Person(False)
    words = {"photo": "photo-0.png", "surroundings": "on blue; rm -rf {path}", "view": ""}
    call(subject, CaptionVersions(tmp_path, {}), store, person, "apply_caption", **words)
    assert "(names invariant traits: blue)" in person.asked[0]
    assert "{" not in person.asked[0]


def test_photos_can_be_viewed_and_are_listed_in_the_briefing(
    subject: SubjectSet, store: LocalStore, tmp_path: Path
) -> None:
    versions = CaptionVersions(tmp_path, {})
    assert call(subject, versions, store, Person(True), "view_photo", photo="photo-3.png")["picture"]
    text = build_system_prompt(subject, versions)
    assert "photo-0.png | caption: at sea | sharpness" in text
    assert "blue fins with white stripes" in text
