"""How a model's words become training prompts."""

from pathlib import Path

import pytest

from tasks.errors import ConfigError
from tasks.subject.captions.captioning import (
    Caption,
    ImageInspection,
    find_objection,
    lint_caption,
    read_captions,
    should_escalate_inspection,
    write_caption,
    write_instance_prompt,
)
from tasks.subject.captions.linting import clean_phrase, find_foreign_nouns, list_forms
from tests.support.config import make_subject_config

CONFIG = make_subject_config()


def inspection(**changes: object) -> ImageInspection:
    good = {
        "evidence": "A fish.", "is_class_noun_visible": True, "num_subjects": "one",
        "is_cut_off": False, "has_watermark": False, "verdict": "accept", "confidence": "high",
        "subject_box": {"left": 0.2, "top": 0.2, "right": 0.8, "bottom": 0.8},
    }  # fmt: skip
    return ImageInspection.model_validate({**good, **changes})


def test_the_instance_prompt_names_the_subject_exactly_once() -> None:
    caption = Caption(surroundings="behind the fish on a table", view="the sks fish seen from above")
    prompt = write_instance_prompt(caption, CONFIG)
    assert prompt == "a photo of sks fish behind on a table, seen from above"


def test_without_an_llm_the_prompt_is_the_template() -> None:
    assert write_instance_prompt(None, CONFIG) == "a photo of sks fish"


def test_the_readable_caption_uses_the_class_noun_without_the_token() -> None:
    assert write_caption(Caption(surroundings="in the snow", view=""), CONFIG) == "a fish in the snow"


def test_a_low_confidence_inspection_escalates_without_an_objection() -> None:
    assert should_escalate_inspection(inspection(), CONFIG) is None
    assert "isn't sure" in str(should_escalate_inspection(inspection(confidence="low"), CONFIG))
    assert find_objection(inspection(confidence="low"), CONFIG) is None


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("on a {table}\n\x1b[31m", "on a table 31m"),
        ("${oc.env:SECRET}", "oc.env SECRET"),
        ("../../etc", "etc"),
        ("  on   sand. ", "on sand"),
        (" ".join(["word"] * 40), " ".join(["word"] * 12)),
    ],
)
def test_model_text_is_sanitized_to_a_short_plain_phrase(text: str, kept: str) -> None:
    assert clean_phrase(text) == kept


def test_objections_name_the_failed_criterion() -> None:
    assert find_objection(inspection(), CONFIG) is None
    assert "no fish seen" in str(find_objection(inspection(is_class_noun_visible=False), CONFIG))
    assert "more than one fish" in str(find_objection(inspection(num_subjects="several"), CONFIG))
    assert "rejects" in str(find_objection(inspection(verdict="reject"), CONFIG))


@pytest.mark.parametrize(
    ("said", "prompt"),
    [
        ("on the beach beside ohwx", "a photo of sks fish on the beach beside"),
        ("on \uff53\uff4b\uff53 sand", "a photo of sks fish on sand"),
        ("near zwx and q9x7 rocks", "a photo of sks fish near and rocks"),
        ("on s\u200bks sand", "a photo of sks fish on sand"),
        ("on <zwx> sand", "a photo of sks fish on sand"),
        ("on \u0455ks sand", "a photo of sks fish on sand"),
        ("in the snow", "a photo of sks fish in the snow"),
        ("on a \ufb02at stone", "a photo of sks fish on a flat stone"),
        ("beside two dogs", "a photo of sks fish"),
        ("with three children", "a photo of sks fish"),
        ("among wolves", "a photo of sks fish"),
        ("with puppies", "a photo of sks fish"),
        ("among other fishes", "a photo of sks fish among other"),
    ],
)
def test_foreign_tokens_and_other_subjects_are_removed_from_captions(said: str, prompt: str) -> None:
    caption, _, _ = lint_caption(Caption(surroundings=said, view=""), set(), CONFIG)
    assert write_instance_prompt(caption, CONFIG) == prompt


@pytest.mark.parametrize("noun", ["puppy", "wolf", "mouse", "dog"])
def test_the_class_noun_and_its_plural_are_not_foreign_nouns(noun: str) -> None:
    config = make_subject_config(class_noun=noun)
    for form in list_forms(noun):
        assert find_foreign_nouns(f"with {form}", class_noun=noun) == []
        prompt = write_instance_prompt(Caption(surroundings=f"with {form}", view=""), config)
        assert prompt == f"a photo of sks {noun} with"


@pytest.mark.parametrize("text", ["x" * 5000, "word " * 5000, "\ufdfa" * 5000, "a\u0300" * 5000])
def test_clean_phrase_bounds_the_length_of_any_text(text: str) -> None:
    assert len(clean_phrase(text)) <= 144


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("photo,surroundings,view\na.jpg,\xfc,\n".encode("latin1"), "line 2: this is not UTF-8; save"),
        (b"photo,surroundings,view\n\na.jpg," + b"y" * 200_000 + b",\n", r"line 3: this is not CSV \(field larger"),
        (b'photo,surroundings,view\na.jpg,"y\n', r"line 2: this is not CSV \(unexpected end"),
        (b"photo;surroundings;view\n", "line 1: there is no column"),
        (b"surroundings,view\n", "line 1: no column"),
        (b"photo,surroundings,view\na.jpg,,,w\n", "line 2: 4 fields, not 3; quote"),
        (b"", "line 1: the file is empty; the columns are"),
    ],
)
def test_a_malformed_caption_file_raises_an_error_naming_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "captions.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"captions.csv, {message}"):
        read_captions(CONFIG.model_copy(update={"captions": str(path)}), {"a.jpg"})


def test_captions_exported_from_a_spreadsheet_are_parsed(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_bytes("\ufeffphoto,surroundings,view\r\n\r\na.jpg,\u00fcber Land\r\n".encode())
    written = read_captions(CONFIG.model_copy(update={"captions": str(path)}), {"a.jpg"})
    assert written == {"a.jpg": Caption(surroundings="\u00fcber Land", view="")}
