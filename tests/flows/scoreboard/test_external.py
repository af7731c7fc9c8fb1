"""Models of other trainers as rows of a scoreboard: a documented folder format, wrong folders named."""

from pathlib import Path

import pytest

from flows.scoreboard.cells import Cell, draw_subjects
from flows.scoreboard.external import list_external
from flows.scoreboard.plan import Plan
from tasks.errors import ConfigError

PLAN = Plan.model_validate({"seeds": [1], "reference": "full", "methods": {"full": {}}})


def list_cells(folder: Path) -> list[Cell]:
    subjects = draw_subjects(["mug-3"], folder.parent / "subjects")
    return list(list_external(folder, PLAN, subjects, output=folder.parent))


def put_model(folder: Path) -> None:
    """Write what stands for a diffusers folder: its index, which is all that is read before anything runs."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')


def test_a_folder_of_models_is_a_row_with_its_seeds_and_token(tmp_path: Path) -> None:
    put_model(tmp_path / "models" / "peer" / "mug-3" / "10")
    put_model(tmp_path / "models" / "peer" / "mug-3" / "9")
    put_model(tmp_path / "models" / "other" / "mug-3")
    (tmp_path / "models" / "peer" / "method.yaml").write_text("token: olis\n")
    cells = list_cells(tmp_path / "models")
    assert [(cell.method, cell.seed) for cell in cells] == [("other", 0), ("peer", 9), ("peer", 10)]
    words = cells[1].words
    assert words[:2] == ("evaluate", str(tmp_path / "models" / "peer" / "mug-3" / "9"))
    assert words[words.index("--token") + 1] == "olis"
    assert words[words.index("--class-noun") + 1] == "mug"
    assert "--token" not in cells[0].words


def test_folders_that_hold_no_models_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    with pytest.raises(ConfigError, match="is not a folder"):
        list_cells(folder)
    folder.mkdir()
    with pytest.raises(ConfigError, match="no models in .*METHOD/SUBJECT"):
        list_cells(folder)
    (folder / "peer" / "mug-3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="mug-3"):
        list_cells(folder)
    (folder / "peer" / "mug-3" / "pytorch_lora_weights.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match="pickle"):
        list_cells(folder)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("full/mug-3", "has the name of a method of the plan"),
        ("peer/dog", "there is no subject of this name; there are mug-3"),
        ("a peer/mug-3", "use letters, digits"),
    ],
)
def test_names_that_are_taken_or_unknown_are_one_line(tmp_path: Path, path: str, reason: str) -> None:
    put_model(tmp_path / "models" / path)
    with pytest.raises(ConfigError, match=reason):
        list_cells(tmp_path / "models")


def test_a_method_file_with_other_fields_is_named(tmp_path: Path) -> None:
    put_model(tmp_path / "models" / "peer" / "mug-3")
    (tmp_path / "models" / "peer" / "method.yaml").write_text("tokn: olis\n")
    with pytest.raises(ConfigError, match=r"method\.yaml: unknown field .tokn."):
        list_cells(tmp_path / "models")


def test_two_names_of_one_seed_are_refused(tmp_path: Path) -> None:
    put_model(tmp_path / "models" / "peer" / "mug-3" / "1")
    put_model(tmp_path / "models" / "peer" / "mug-3" / "01")
    with pytest.raises(ConfigError, match="the same seed, such as 1 and 01"):
        list_cells(tmp_path / "models")
