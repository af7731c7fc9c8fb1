"""Which subjects there are: CSV lines, folders, and a prefix of the store; a bad one is refused alone."""

import os
import shutil
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from conf.compose import compile_request
from conf.overrides import parse_overrides
from conf.request import RunRequest
from conf.subjects import MAX_FILE_BYTES, ManyRequest, parse_subject_file
from flows.subjects import listing
from flows.subjects.listing import Origin, Subject, list_subjects
from tasks.errors import ConfigError
from tasks.services.store.local import LocalStore
from tests.support.tiny import draw_photos


def find(where: str, tmp_path: Path, **options: object) -> list[Subject]:
    base = options.pop("base", RunRequest())
    request = ManyRequest.model_validate({"subjects": where, "base": base, "settle_seconds": 0, **options})
    return list(list_subjects(Origin(request, LocalStore(tmp_path / "store"), None)))


def make_folder(folder: Path, text: str = "class_noun: fish\n") -> Path:
    draw_photos(folder, num=2)
    (folder / "subject.yaml").write_text(text)
    return folder


def test_csv_columns_other_than_the_named_ones_are_settings(tmp_path: Path) -> None:
    draw_photos(tmp_path / "rex", num=2)
    table = tmp_path / "subjects.csv"
    table.write_text(
        "source,class_noun,name,training.max_train_steps,training.learning_rate,training/method\n"
        "rex,fish,Rex,12,2e-6,lora\ndemo,fish,,,,\n"
    )
    first, second = find(str(table), tmp_path)
    assert first.request is not None
    assert second.request is not None
    assert (first.name, second.name) == ("Rex", "line 3")
    assert first.request.source == str(tmp_path / "rex")  # relative to the file
    assert first.request.method == "lora"
    assert first.request.settings == {"training.max_train_steps": 12, "training.learning_rate": 2e-6}
    assert second.request.settings == {}


def test_a_bad_line_is_refused_alone_and_names_its_number(tmp_path: Path) -> None:
    table = tmp_path / "subjects.csv"
    table.write_text(
        "source,class_noun,training.max_train_steps\ndemo,fish,0\nnowhere,fish,\n,fish,\ndemo,,\ndemo,fish,4\n"
    )
    subjects = find(str(table), tmp_path)
    assert [bool(subject.request) for subject in subjects] == [False, False, False, False, True]
    problems = [subject.problem for subject in subjects]
    assert "subjects.csv, line 2" in problems[0]
    assert "training.max_train_steps" in problems[0]
    assert "is not a folder" in problems[1]
    assert problems[2].endswith("no source")
    assert problems[3].endswith("no class_noun")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source,noun\nx,fish\n", "line 1: no column class_noun; the columns are source,class_noun"),
        ("source,class_noun,source\n", "duplicate column"),
        ("", "the file is empty"),
        ("source,class_noun\n", "no subjects"),
    ],
)
def test_a_table_without_its_columns_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "subjects.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        find(str(tmp_path / "subjects.csv"), tmp_path)


def test_an_unknown_setting_in_a_column_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "subjects.csv").write_text("source,class_noun,training.max_train_step\ndemo,fish,4\n")
    assert "did you mean training.max_train_steps" in find(str(tmp_path / "subjects.csv"), tmp_path)[0].problem


def test_folders_with_a_description_are_subjects_and_take_the_common_settings(tmp_path: Path) -> None:
    make_folder(tmp_path / "in" / "a", "class_noun: fish\nsettings:\n  training.learning_rate: 2e-6\n")
    make_folder(tmp_path / "in" / "b", "class_noun: fish\nsettings: {training/method: lora}\n")
    draw_photos(tmp_path / "in" / "no description", num=2)
    base = parse_overrides(["training.max_train_steps=7"])
    first, second = find(str(tmp_path / "in"), tmp_path, base=base)
    assert first.request is not None
    assert second.request is not None
    # All of YAML's scalars are read as text; the schema makes it the number that it is.
    assert first.request.settings == {"training.max_train_steps": 7, "training.learning_rate": "2e-6"}
    assert compile_request(first.request).training.learning_rate == 2e-6
    assert second.request.method == "lora"
    assert second.request.settings == {"training.max_train_steps": 7}


def test_a_subject_below_a_prefix_is_known_by_its_content(tmp_path: Path) -> None:
    make_folder(tmp_path / "store" / "subjects" / "rex")
    (rex,) = find("store:subjects/", tmp_path)
    assert rex.request is not None
    assert rex.request.source == "store:subjects/rex/"
    (again,) = find("store:subjects/", tmp_path)
    assert again.key == rex.key
    draw_photos(tmp_path / "store" / "subjects" / "rex", num=2, seed=8)
    (changed,) = find("store:subjects/", tmp_path)
    assert changed.key != rex.key
    (other,) = find("store:subjects/", tmp_path, base=parse_overrides(["seed=9"]))
    assert other.key != changed.key


def test_a_folder_that_is_still_being_written_is_left_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "in" / "whole")
    make_folder(tmp_path / "in" / "partial", "class_noun: fish\nphotos: [photo-0.png, late.png]\n")
    for path in tmp_path.glob("in/*/*"):
        os.utime(path, (1, 1))  # as `cp -a`, `rsync -t` and `unzip` do
    fresh = {each.name: each for each in find(str(tmp_path / "in"), tmp_path, settle_seconds=60)}
    assert fresh["whole"].is_incomplete
    assert fresh["whole"].problem == "a file was written just now"
    now = time.time()
    monkeypatch.setattr(listing.time, "time", lambda: now + 61)
    later = {each.name: each for each in find(str(tmp_path / "in"), tmp_path, settle_seconds=60)}
    assert later["whole"].request is not None
    assert later["partial"].is_incomplete
    assert later["partial"].problem == "late.png is missing"


def test_a_subject_is_known_by_photos_and_settings_wherever_it_lies(tmp_path: Path) -> None:
    make_folder(tmp_path / "in" / "rex")
    (rex,) = find(str(tmp_path / "in"), tmp_path)
    (tmp_path / "in").rename(tmp_path / "moved")
    (tmp_path / "moved" / "rex" / "subject.yaml").write_text("# a comment\nclass_noun: fish\n")
    (moved,) = find(str(tmp_path / "moved"), tmp_path, base=parse_overrides([f"output_dir={tmp_path}/elsewhere"]))
    assert moved.key == rex.key
    shutil.copytree(tmp_path / "moved" / "rex", tmp_path / "store" / "subjects" / "rex")
    (stored,) = find("store:subjects/", tmp_path)
    assert stored.key == rex.key


def test_descriptions_reach_no_host_key_or_folder_from_a_terminal_either(tmp_path: Path) -> None:
    for number, setting in enumerate(("llm.profiles.local.base_url: http://evil.example/v1", "output_dir: /etc")):
        make_folder(tmp_path / "in" / str(number), f"class_noun: fish\nsettings:\n  {setting}\n")
    make_folder(tmp_path / "in" / "good")
    *bad, good = find(str(tmp_path / "in"), tmp_path)
    assert [subject.request for subject in bad] == [None, None]
    assert good.request is not None


def test_links_and_special_files_are_no_descriptions(tmp_path: Path) -> None:
    make_folder(tmp_path / "elsewhere")
    (tmp_path / "in" / "fifo").mkdir(parents=True)
    os.mkfifo(tmp_path / "in" / "fifo" / "subject.yaml")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    make_folder(tmp_path / "in" / "good")
    (tmp_path / "in" / "huge").mkdir()
    (tmp_path / "in" / "huge" / "subject.yaml").write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    found = {subject.name: subject for subject in find(str(tmp_path / "in"), tmp_path)}
    assert found.pop("good").request is not None
    assert len(found) == 3
    assert all(subject.problem and subject.request is None for subject in found.values())


def test_one_line_with_an_unknown_home_folder_is_refused_alone(tmp_path: Path) -> None:
    (tmp_path / "subjects.csv").write_text("source,class_noun\n~nosuchuser/x,fish\ndemo,fish\n")
    first, second = find(str(tmp_path / "subjects.csv"), tmp_path)
    assert "line 2" in first.problem
    assert second.request is not None


def test_equal_subjects_are_run_once(tmp_path: Path) -> None:
    (tmp_path / "subjects.csv").write_text("source,class_noun,name\ndemo,fish,a\ndemo,fish,b\ndemo,fish,a\n")
    first, second, third = find(str(tmp_path / "subjects.csv"), tmp_path)
    assert first.request is not None
    for again in (second, third):
        assert (again.request, again.problem) == (None, "the same photos and settings as a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class_noun: fish\nsource: /etc\n", "source"),
        ("class_noun: fish\nsettings: {subject.source: /etc}\n", "subject.source is not set here"),
        ("class_noun: fish\nsettings: {subject: demo}\n", "subject is not set here"),
        ("class_noun: fish\nsettings: {training/method: [lora]}\n", "training/method: name one option"),
        ("class_noun: fish\nsettings: {llm.profiles: {a: 1}}\n", "settings"),
        ("class_noun: &a [*a]\n", "anchors and aliases"),
        ("!!python/object/apply:os.system [true]\n", "subject.yaml"),
        ("class_noun: !!bool maybe\nphotos: !!int ''\n", "subject.yaml"),
        ("class_noun: fish\nsettings: {seed: 0x" + "f" * 20_000 + "}\n", "characters"),
        ("? [a]\n: b\n", "subject.yaml"),
        ("just text\n", "subject.yaml"),
        ("a: [\n", "not YAML"),
        ("[" * 5_000, "not YAML"),
        ("x" * (MAX_FILE_BYTES + 1), "at most"),
        ("class_noun:\n  - 2026-99-99\n", "subject.yaml"),
        ("\xff\xfe", "not YAML|subject.yaml"),
    ],
    ids=lambda value: value[:20],
)
def test_hostile_descriptions_are_refused_with_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_subject_file(text.encode("latin-1"))
    assert "\n" not in str(raised.value)


def test_a_hostile_description_stops_no_other_subject(tmp_path: Path) -> None:
    make_folder(tmp_path / "in" / "a", "class_noun: [\n")
    make_folder(tmp_path / "in" / "b")
    first, second = find(str(tmp_path / "in"), tmp_path)
    assert "not YAML" in first.problem
    assert second.request is not None


def test_too_many_subjects_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_SUBJECTS", 2)
    (tmp_path / "subjects.csv").write_text("source,class_noun,seed\n" + "".join(f"demo,fish,{n}\n" for n in range(3)))
    with pytest.raises(ConfigError, match="more than 2 subjects"):
        find(str(tmp_path / "subjects.csv"), tmp_path)


def test_a_bucket_is_named_by_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store=s3 store\.bucket"):
        find("s3://bucket/subjects", tmp_path)
    with pytest.raises(ConfigError, match="end the prefix with /"):
        find("store:subjects", tmp_path)


def test_an_empty_inbox_is_no_error_for_a_schedule(tmp_path: Path) -> None:
    assert find("store:subjects/", tmp_path, wait=False) == []
    with pytest.raises(ConfigError, match="no subjects"):
        find("store:subjects/", tmp_path)


def test_the_form_bounds_its_fields() -> None:
    for fields in ({"subjects": ""}, {"subjects": "a\x1b[31m"}, {"settle_seconds": -1}, {"unknown": 1}):
        with pytest.raises(ValidationError):
            ManyRequest.model_validate(fields)
