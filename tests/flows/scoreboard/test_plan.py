"""The plan of a scoreboard: the shipped one, and what a person's own file can get wrong."""

from pathlib import Path

import pytest
import yaml

from conf.compose import compile_request
from flows.scoreboard.cells import SubjectFile, draw_subjects, list_cells, read_subjects
from flows.scoreboard.plan import SHIPPED, Plan, read_plan
from tasks.errors import ConfigError


def write_plan(folder: Path, **changes: object) -> Path:
    plain = {"seeds": [1], "reference": "a", "methods": {"a": {}, "b": {}}, **changes}
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


SHIPPED_METHODS = {
    "full": ("full", True), "full-no-prior": ("full", False),
    "lora": ("lora", True), "lora-no-prior": ("lora", False),
    "token": ("textual_inversion", False),
    "token+lora": ("textual_inversion+lora", True), "token+lora-no-prior": ("textual_inversion+lora", False),
    "full-wrong-noun": ("full", True),
}  # fmt: skip
"""Method, and whether there is prior preservation."""
SECONDS_PER_MODEL = 41  # measured: 28 in 19 min 11 s, two at a time


def test_the_shipped_plan_has_every_method_with_and_without_prior_preservation(tmp_path: Path) -> None:
    plan = read_plan(SHIPPED)
    cells = list(list_cells(plan, draw_subjects(plan.drawn, tmp_path), tmp_path))
    configs = {cell.method: compile_request(cell.request) for cell in cells if cell.subject == plan.drawn[0]}
    found = {
        name: (config.training.method, config.training.prior_loss_weight > 0 and config.prior.num_class_images > 0)
        for name, config in configs.items()
    }
    assert found == SHIPPED_METHODS
    assert {config.training.max_train_steps for config in configs.values()} == {150}  # the same budget for all


def test_the_shipped_plan_is_one_run_per_method_and_subject_within_half_an_hour(tmp_path: Path) -> None:
    plan = read_plan(SHIPPED)
    cells = list(list_cells(plan, draw_subjects(plan.drawn, tmp_path), tmp_path))
    assert len({cell.key for cell in cells}) == len(cells) == 32
    assert len(cells) * SECONDS_PER_MODEL < 30 * 60
    assert all(len(list((tmp_path / name).glob("*.jpg"))) == 5 for name in ("mug-3", "robot-5", "house-11", "fish-7"))
    for cell in cells:
        own = cell.subject.split("-")[0]
        assert (cell.request.class_noun == own) is (cell.method != "full-wrong-noun"), cell.name


def test_the_shipped_plan_checks_the_papers_findings_in_their_direction() -> None:
    directions = {(d.method, d.reference, d.metrics[0], d.expected) for d in read_plan(SHIPPED).directions}
    assert directions == {
        ("full", "full-no-prior", "pres", "lower"), ("full", "full-no-prior", "div", "higher"),
        ("full-wrong-noun", "full", "dino", "lower"), ("token", "full", "dino", "lower"),
    }  # fmt: skip


def test_a_wrong_class_noun_is_that_of_another_subject(tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path, methods={"a": {}, "wrong": {"class_noun": "wrong"}}))
    subjects = draw_subjects(["mug-3", "mug-4", "fish-7"], tmp_path)
    nouns = {
        cell.subject: cell.request.class_noun for cell in list_cells(plan, subjects, tmp_path) if cell.method == "wrong"
    }
    assert nouns == {"mug-3": "fish", "mug-4": "fish", "fish-7": "mug"}
    with pytest.raises(ConfigError, match="another class noun than mug"):
        list(list_cells(plan, subjects[:2], tmp_path))


def test_a_part_of_a_plan_keeps_what_still_makes_sense() -> None:
    part = read_plan(SHIPPED).restrict(("lora", "full-no-prior", "full"), 3)
    assert list(part.methods) == ["full", "full-no-prior", "lora"]
    assert part.seeds == (23, 24, 25)
    assert {(d.method, d.reference) for d in part.directions} == {("full", "full-no-prior")}
    assert read_plan(SHIPPED).restrict(("lora",), None).reference == "lora"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reference": "c"}, "there is no method c; there are a, b"),
        ({"seeds": [1, 1]}, "the same seed twice"),
        ({"seeds": []}, "seeds"),
        ({"settings": ["seed=4"]}, "seed: subjects, seeds and the folder are the scoreboard's own"),
        ({"settings": ["output_dir=/etc"]}, "the scoreboard's own"),
        ({"settings": ["nonsense"]}, "not of the form key=value"),
        ({"methods": {"../a": {}}, "reference": "../a"}, "use letters, digits"),
        ({"methods": {"base": {}}, "reference": "base"}, "not 'base'"),
        ({"methods": {"a": {"setting": []}}}, "setting"),
        ({"directions": [{"claim": "x", "method": "a", "reference": "z", "metrics": ["dino"], "expected": "lower"}]},
         "there is no method z"),
        ({"directions": [{"claim": "x", "method": "a", "reference": "b", "metrics": ["dyno"], "expected": "lower"}]},
         "there is no metric dyno"),
    ],
)  # fmt: skip
def test_a_wrong_plan_is_one_line_with_the_files_name(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_plan(write_plan(tmp_path, **changes))
    assert str(caught.value).startswith("plan.yaml: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: &x [*x]", b"- 1", b"[" * 3000, b"x" * 100_000])
def test_a_file_that_is_no_plan_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^plan\.yaml"):
        read_plan(path)


def test_a_setting_that_no_run_has_is_refused_before_anything_runs(tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path, settings=["training.max_train_stepz=3"]))
    with pytest.raises(ConfigError, match="max_train_stepz"):
        list(list_cells(plan, draw_subjects(["mug-3"], tmp_path), tmp_path))


def test_subjects_are_folders_with_a_file_that_names_the_class(tmp_path: Path) -> None:
    for name in ("rex", "tom"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "subject.yaml").write_text("class_noun: dog\nsettings: {training.learning_rate: 2e-6}\n")
    (tmp_path / "no subject").mkdir()
    found = read_subjects(tmp_path)
    assert [subject.name for subject in found] == ["rex", "tom"]
    [first, *_] = list_cells(Plan(seeds=(1,), reference="a", methods={"a": {}}), found, tmp_path)
    assert first.request.settings["training.learning_rate"] == "2e-6"
    assert first.request.class_noun == "dog"
    assert found[0].file == SubjectFile(class_noun="dog", settings={"training.learning_rate": "2e-6"})


@pytest.mark.parametrize("name", ["dragon-3", "mug", "mug-", "mug-3; rm", "../mug-3"])
def test_a_subject_that_cannot_be_drawn_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no class noun and number"):
        draw_subjects([name], tmp_path)


def test_folders_without_subjects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="class_noun: mug"):
        read_subjects(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        read_subjects(tmp_path / "missing")


@pytest.mark.parametrize("setting", ["output_dir: /etc", "seed: 3", "subject.class_noun: cat"])
def test_a_subject_may_not_set_what_the_scoreboard_sets(tmp_path: Path, setting: str) -> None:
    (tmp_path / "rex").mkdir()
    (tmp_path / "rex" / "subject.yaml").write_text(f"class_noun: dog\nsettings: {{{setting}}}\n")
    with pytest.raises(ConfigError, match="scoreboard's own"):
        read_subjects(tmp_path)


def test_a_dry_run_draws_nothing(tmp_path: Path) -> None:
    [subject] = draw_subjects(["mug-3"], tmp_path / "subjects", is_dry=True)
    assert subject.photos == (tmp_path / "subjects" / "mug-3").absolute()
    assert list(tmp_path.iterdir()) == []
