"""What becomes of photos and of what models say about them: leaks, refusals, warnings, a person's word."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ConfigError, SubjectRejected
from tasks.services.llm.config import CapabilityConfig
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tasks.subject.captions.captioning import (
    Caption,
    PhotoAnnotation,
    annotate_photos,
    digest_prompts,
    lint_caption,
)
from tasks.subject.captions.linting import find_leaks, list_trait_words
from tasks.subject.config import SubjectConfig
from tasks.subject.photos.ingest import CheckedPhotos
from tasks.subject.photos.quality import Box
from tasks.subject.selection import Selection, check_leaks, profile_subject, select_photos
from tasks.subject.subject_profile import Overview, find_warnings
from tests.support.config import make_subject_config
from tests.support.llm import CHAT, make_llm
from tests.support.llm_server import ScriptedServer, completion, scripted_server
from tests.support.subject import INSPECTION, PROFILE


def config_of(photos: CheckedPhotos, **changes: Any) -> SubjectConfig:
    return make_subject_config(**changes)


class Answering(ScriptedServer):
    """Answers by what is asked: an inspection, a caption, or a profile."""

    def __init__(self, reply: Callable[[str, int], Any]) -> None:
        super().__init__()
        self.reply = reply
        self.asked: dict[str, int] = {}

    def next_answer(self) -> Any:
        body = self.bodies[-1]
        name = body["response_format"]["json_schema"]["name"]
        is_repair = len(body["messages"]) > 2
        number = self.asked.get(name, 0) - is_repair
        self.asked[name] = number + 1
        told = self.reply(name, number)
        message = completion(None, refusal="no") if told is None else completion(json.dumps(told))
        return 200, {}, json.dumps(message).encode()


def answers(name: str, number: int) -> Any:
    if name == "ImageInspection":
        return INSPECTION.model_dump()
    return {"surroundings": "on the beach", "view": ""} if name == "Caption" else PROFILE.model_dump()


def test_trait_words_are_detected_in_captions_and_common_words_are_not() -> None:
    words = list_trait_words(PROFILE.invariant_traits, class_noun="fish")
    assert words == {"blue", "fins", "white", "stripes", "round"}
    assert find_leaks("on blue sand with stripes", words) == ["blue", "stripes"]
    assert find_leaks("on the beach, seen from the side", words) == []


def test_a_caption_phrase_that_names_an_invariant_trait_is_removed() -> None:
    config = make_subject_config()
    caption, leaks, _ = lint_caption(Caption(surroundings="in the snow", view="its blue fins up"), {"blue"}, config)
    assert (caption.surroundings, caption.view, leaks) == ("in the snow", "", ["blue"])


def test_trait_leaks_are_removed_and_counted_and_too_many_stop_the_run(
    photos: CheckedPhotos, store: LocalStore
) -> None:
    config = config_of(photos)
    leaky, clean = Caption(surroundings="on the beach", view="blue stripes"), Caption(surroundings="at sea", view="")
    described = {
        photo.sha256: PhotoAnnotation(INSPECTION, leaky if n < 3 else clean) for n, photo in enumerate(photos.accepted)
    }
    outcome = select_photos(
        StageFolder(store, "subject", "k"), photos.accepted, described, config=config, overview=Overview(PROFILE)
    )
    assert [image.instance_prompt for image in outcome.images][:1] == ["a photo of sks fish on the beach"]
    assert outcome.leaks[0].endswith(": blue, stripes")
    with pytest.raises(SubjectRejected, match=r"3 of 4 captions name invariant traits .*photo-0.png: blue, stripes"):
        check_leaks(outcome, config)
    check_leaks(outcome, config_of(photos, max_leak_fraction=1.0))
    assert "trained anyway, as subject.max_leak_fraction=1 says" in outcome.warnings[-1]
    check_leaks(Selection(), config)


def test_a_refused_photo_is_quarantined_and_restored_by_a_user_caption(
    photos: CheckedPhotos, store: LocalStore, tmp_path: Path
) -> None:
    def refuse_first(name: str, number: int) -> Any:
        return None if name == "Caption" and number == 0 else answers(name, number)

    config = config_of(photos)
    with scripted_server(Answering(refuse_first)) as server:
        llm = make_llm(server, tmp_path, concurrency=1)
        described = annotate_photos(photos, config, llm=llm, on_progress=lambda done, total: None)
        outcome = select_photos(
            StageFolder(store, "subject", "k"), photos.accepted, described, config=config, overview=None
        )
        assert [aside.source_name for aside in outcome.quarantined] == ["photo-0.png"]
        assert "the model refused" in outcome.quarantined[0].reason
        assert len(outcome.images) == 3

        path = tmp_path / "captions.csv"
        path.write_text("photo,surroundings,view\nphoto-0.png,in a blue bowl,seen from above\n")
        own = config_of(photos, captions=str(path))
        calls = server.counts[CHAT]
        described = annotate_photos(photos, own, llm=llm, on_progress=lambda done, total: None)
        assert server.counts[CHAT] == calls  # the others' replies are kept, this one needs none
        outcome = select_photos(
            StageFolder(store, "subject", "k"), photos.accepted, described, config=own, overview=Overview(PROFILE)
        )
        assert outcome.images[0].instance_prompt == "a photo of sks fish in a blue bowl, seen from above"
        assert (outcome.quarantined, outcome.leaks) == ([], [])


def test_max_trained_selects_the_top_photos(photos: CheckedPhotos, store: LocalStore) -> None:
    shas = [photo.sha256 for photo in photos.accepted]
    described = {sha256: PhotoAnnotation(INSPECTION, Caption(surroundings="at sea", view="")) for sha256 in shas}

    def choose(best: tuple[str, ...], num: int | None) -> Selection:
        overview = Overview(PROFILE, best)
        config = config_of(photos, max_trained=num)
        return select_photos(
            StageFolder(store, "subject", "k"), photos.accepted, described, config=config, overview=overview
        )

    few = choose((shas[2], shas[0]), 2)
    assert [image.source_sha256 for image in few.images] == [shas[0], shas[2]]
    assert "not among the best 2" in few.rejected[0].reason
    sharpest = max(photos.accepted, key=lambda photo: photo.measures.sharpness)
    assert [image.source_sha256 for image in choose((), 1).images] == [sharpest.sha256]
    assert len(choose((), None).images) == 4
    assert few.images[0].focus == (0.3, 0.5)


def test_an_invalid_box_has_no_center() -> None:
    assert Box(left=0.5, top=0.1, right=0.2, bottom=0.9).find_center() is None
    assert Box(left=0.5, top=0.5, right=0.51, bottom=0.51).find_center() is None


def test_captions_above_batch_threshold_use_one_batch_job(photos: CheckedPhotos, tmp_path: Path) -> None:
    class Rows(Answering):
        def answer_row(self, body: dict[str, Any]) -> dict[str, Any]:
            self.bodies.append(body)
            return super().answer_row(body)

    with scripted_server(Rows(answers)) as server:
        llm = make_llm(server, tmp_path)
        shown: list[tuple[int, int]] = []
        described = annotate_photos(
            photos, config_of(photos, batch_threshold=4), llm=llm, on_progress=lambda *at: shown.append(at)
        )
        assert [found.caption.surroundings for found in described.values() if found.caption] == ["on the beach"] * 4
        assert (server.counts[CHAT], server.counts["POST /v1/batches"], server.counts["row"]) == (4, 1, 4)
        assert shown[-1] == (8, 8)
        annotate_photos(photos, config_of(photos), llm=llm, on_progress=lambda done, total: None)
        assert server.counts[CHAT] == 4  # the replies of the job serve calls


def test_a_rejected_photo_is_not_captioned(photos: CheckedPhotos, tmp_path: Path) -> None:
    def object_to_first(name: str, number: int) -> Any:
        bad = {**INSPECTION.model_dump(), "verdict": "reject"}
        return bad if name == "ImageInspection" and number == 0 else answers(name, number)

    with scripted_server(Answering(object_to_first)) as server:
        able = CapabilityConfig(response_format="json_schema", tools=False)
        llm = make_llm(server, tmp_path, concurrency=1, capabilities=able)
        annotate_photos(photos, config_of(photos), llm=llm, on_progress=lambda done, total: None)
        assert server.asked == {"ImageInspection": 4, "Caption": 3}


def test_an_invalid_caption_file_raises_an_error_with_the_reason(photos: CheckedPhotos, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("name\nx\n")
    with scripted_server() as server:
        llm = make_llm(server, tmp_path)
        (tmp_path / "other.csv").write_text("photo\nphoto-9.png\n")
        messages = {
            "bad.csv": "line 1: there is no column 'name'",
            "none.csv": "No such file",
            "other.csv": "no photo 'photo-9.png'",
        }
        for name, message in messages.items():
            config = config_of(photos, captions=str(tmp_path / name))
            with pytest.raises(ConfigError, match=message):
                annotate_photos(photos, config, llm=llm, on_progress=lambda done, total: None)


def test_user_captions_with_the_template_send_no_llm_request(
    photos: CheckedPhotos, tmp_path: Path, store: LocalStore
) -> None:
    path = tmp_path / "captions.csv"
    path.write_text("photo,surroundings,view\nphoto-1.png,at sea,\n")
    config = config_of(photos, captions=str(path), captioning="template")
    with scripted_server() as server:
        llm = make_llm(server, tmp_path)
        described = annotate_photos(photos, config, llm=llm, on_progress=lambda done, total: None)
        assert not server.counts
    outcome = select_photos(
        StageFolder(store, "subject", "k"), photos.accepted, described, config=config, overview=None
    )
    prompts = [image.instance_prompt for image in outcome.images]
    assert prompts == ["a photo of sks fish", "a photo of sks fish at sea", *["a photo of sks fish"] * 2]


def test_the_subject_profile_request_contains_as_many_photos_as_fit(photos: CheckedPhotos, tmp_path: Path) -> None:
    with scripted_server(Answering(answers)) as server:
        llm = make_llm(server, tmp_path)
        overview = profile_subject(photos, config_of(photos), llm=llm)
        assert overview is not None
        assert overview.profile.class_noun == "fish"
        assert overview.best == (photos.accepted[2].sha256, photos.accepted[0].sha256)  # there is no ninth
        assert count_images(server.bodies[-1]) == 4
        small = llm.config.profiles["p"].capabilities.model_copy(update={"context_tokens": 1500})
        llm.config.profiles["p"] = llm.config.profiles["p"].model_copy(update={"capabilities": small, "model": "other"})
        profile_subject(photos, config_of(photos), llm=llm)
        assert 1 <= count_images(server.bodies[-1]) < 4
        assert server.counts[CHAT] == 2
        assert profile_subject(photos, config_of(photos, is_profiled=False), llm=llm) is None


def count_images(body: dict[str, Any]) -> int:
    return sum(part["type"] == "image_url" for part in body["messages"][1]["content"])


def test_a_refused_subject_profile_does_not_stop_the_run(photos: CheckedPhotos, tmp_path: Path) -> None:
    with scripted_server(Answering(lambda name, number: None)) as server:
        assert profile_subject(photos, config_of(photos), llm=make_llm(server, tmp_path)) is None


def test_a_wrong_class_noun_and_mixed_subjects_raise_warnings() -> None:
    config = make_subject_config(class_noun="dog")
    assert find_warnings(PROFILE, make_subject_config()) == []
    wrong = PROFILE.model_copy(update={"is_class_noun_right": False, "is_one_subject": False})
    noun, mixed = find_warnings(wrong, config)
    assert "look like a fish rather than a dog" in noun
    assert "one and the same subject" in mixed


def test_a_changed_prompt_changes_the_prompt_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_prompts()
    monkeypatch.setattr("tasks.subject.captions.captioning.CAPTION", "Caption it.")
    assert digest_prompts() != before
