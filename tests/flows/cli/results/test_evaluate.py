"""The arguments of `likeness evaluate` are values, whatever they look like."""

from pathlib import Path

import pytest

from conf.compose import compile_request
from flows.cli.results.evaluate import Subject, make_request
from tasks.diffusion.hub import MINI_FOLDER
from tasks.errors import ConfigError

MODEL = str(MINI_FOLDER / "base")


@pytest.mark.parametrize("noun", ["null", "true", "tea pot"])
def test_class_noun_token_and_photos_are_not_read_as_settings(tmp_path: Path, noun: str) -> None:
    photos = tmp_path / "a,b=[c]"
    photos.mkdir()
    request = make_request(MODEL, Subject(photos, noun, "null"), ["evaluation=quick"])
    config = compile_request(request.base)
    assert config.subject.source == str(photos)
    assert config.subject.class_noun == noun
    assert config.subject.identifier_token == "null"
    assert request.base.evaluation == "quick"
    assert config.tracking.kind == "none"


def test_a_class_noun_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="class_noun") as caught:
        make_request(MODEL, Subject(tmp_path, "x" * 61), [])
    assert "\n" not in str(caught.value)
