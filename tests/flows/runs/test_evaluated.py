"""Which photos an evaluated model was tuned on, by the lineage beside it."""

import json
import os
from pathlib import Path

import pytest

from flows.runs.evaluated import count_unmatched_photos
from tests.support.subject import make_subject_set

SUBJECT = make_subject_set(num=2)
OWN = [image.source_sha256 for image in SUBJECT.images]


@pytest.mark.parametrize(
    ("photos", "expected"),
    [(OWN, 0), (["f" * 64, OWN[1]], 0), (["f" * 64, "e" * 64, "d" * 64], 3), ([], 0)],
)
@pytest.mark.parametrize("name", ["", "pytorch_lora_weights.safetensors"])
def test_photos_of_a_lineage_are_counted_where_the_subject_has_none_of_them(
    tmp_path: Path, photos: list[str], expected: int, name: str
) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    (tmp_path / "lineage.json").write_text(json.dumps({"photos": photos}))
    assert count_unmatched_photos(tmp_path / name, SUBJECT) == expected


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"photos": 3}', '{"class_images": []}', "[" * 100_000])
def test_a_model_without_a_readable_lineage_has_no_unmatched_photos(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "lineage.json").write_text(content)
    assert count_unmatched_photos(tmp_path, SUBJECT) == 0


@pytest.mark.timeout(60)
def test_a_lineage_that_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lineage.json")  # whose reading would never end
    assert count_unmatched_photos(tmp_path, SUBJECT) == 0
    (tmp_path / "lineage.json").unlink()
    (tmp_path / "lineage.json").symlink_to("/dev/zero")
    assert count_unmatched_photos(tmp_path, SUBJECT) == 0
