"""Which prompts a set or a file stands for, and what is said of a line that is none."""

from pathlib import Path

import pytest

from conf.compose import compile_request
from conf.overrides import parse_overrides
from conf.request import RunRequest
from conf.schema import RunConfig
from tasks.errors import ConfigError
from tasks.evaluation.prompt_sets import (
    check_prompt,
    find_kind,
    find_version,
    identify_prompts,
    read_set_file,
    resolve_prompts,
)
from tasks.manifests.evaluation import PromptSet
from tasks.prompts import write_plain_prompt, write_subject_prompt
from tasks.stage.digests import digest

KINDS = ("object", "living")


def configure(*words: str, noun: str = "mug") -> RunConfig:
    return compile_request(parse_overrides(["subject.source=photos", f"subject.class_noun={noun}", *words]))


def count_kinds(config: RunConfig) -> dict[str, int]:
    kinds = [prompt.kind for prompt in config.evaluation.prompts]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_shipped_prompt_is_a_valid_template_and_no_prompt_occurs_twice(kind: str) -> None:
    stored = read_set_file(kind)
    prompts = [prompt for group in stored["prompts"].values() for prompt in group]
    assert [check_prompt(prompt) for prompt in prompts] == prompts
    assert len(set(prompts)) == len(prompts) >= 40
    for name, counts in stored["sets"].items():
        for of, num in counts.items():  # type: ignore[attr-defined]
            assert 0 < num <= len(stored["prompts"][of]), f"{name} asks for {num} of {of}"


# Of the sets and prompts of each version. Another digest: raise `version` in the file, and write both here.
VERSIONS = {"object": (1, "76601cdf2f5a"), "living": (1, "0dbe36c6bf3e")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_shipped_file_that_changes_has_another_version(kind: str) -> None:
    stored = read_set_file(kind)
    assert (find_version(kind), digest([stored["sets"], stored["prompts"]])[:12]) == VERSIONS[kind]


@pytest.mark.parametrize(("noun", "kind"), [("mug", "object"), ("dog", "living")])
def test_prompts_of_a_shipped_set_are_known_by_its_name_and_version(noun: str, kind: str) -> None:
    def identify(*words: str) -> PromptSet | None:
        config = configure(*words, noun=noun).evaluation
        rows = [prompt.model_dump() for prompt in config.prompts]
        return identify_prompts(rows, class_noun=noun, subject_kind=config.subject_kind)

    assert identify() == PromptSet(name=f"{kind}/standard", version=1)
    for name in ("quick", "standard", "thorough", "dreambench"):
        assert identify(f"evaluation={name}") == PromptSet(name=f"{kind}/{name}", version=1)
    assert identify("evaluation=dreambench", "evaluation.subject_kind=living") == PromptSet(
        name="living/dreambench", version=1
    )
    assert identify("evaluation.prompts=['a photo of {subject}']") is None


def test_presets_differ_in_prompts_and_images_and_the_default_stays_at_six_by_two() -> None:
    sizes = {}
    for preset in ("quick", "standard", "thorough", "dreambench"):
        config = configure(f"evaluation={preset}").evaluation
        sizes[preset] = (len(config.prompts), config.num_images_per_prompt)
    assert sizes == {"quick": (3, 1), "standard": (6, 2), "thorough": (12, 4), "dreambench": (25, 4)}
    smoke = configure("experiment=smoke").evaluation
    assert (len(smoke.prompts), smoke.num_images_per_prompt, smoke.num_class_images) == (2, 1, 2)


def test_dreambench_has_the_papers_kinds_for_objects_and_for_living_subjects() -> None:
    assert count_kinds(configure("evaluation=dreambench", noun="mug")) == {"scene": 20, "property": 5}
    living = {"scene": 10, "accessory": 10, "property": 5}
    assert count_kinds(configure("evaluation=dreambench", noun="dog")) == living


def test_an_unknown_subject_kind_is_the_only_setting_that_is_named() -> None:
    with pytest.raises(ConfigError) as refused:
        configure("evaluation.subject_kind=lving")
    assert "subject_kind" in str(refused.value)
    assert "prompts" not in str(refused.value)


def test_subject_kind_overrides_what_the_class_noun_says() -> None:
    plain = configure("evaluation=dreambench", noun="mug")
    assert "accessory" in count_kinds(configure("evaluation=dreambench", "evaluation.subject_kind=living", noun="mug"))
    assert "accessory" not in count_kinds(plain)
    assert (find_kind("polar bear"), find_kind("teddy bear toy"), find_kind("")) == ("living", "object", "object")


def test_clip_t_gets_a_class_prompt_with_a_single_article() -> None:
    for kind in KINDS:
        for row in resolve_prompts("set:all", class_noun="owl", subject_kind=kind):
            plain = write_plain_prompt(row["text"], class_noun="owl")
            assert "{" not in plain
            assert " a an " not in plain
            assert " an an " not in plain
            assert "sks owl" in write_subject_prompt(row["text"], identifier_token="sks", class_noun="owl")


def test_a_text_file_is_one_template_per_line_without_comments(tmp_path: Path) -> None:
    path = tmp_path / "my prompts.txt"
    path.write_text("# mine\na photo of {subject} on Mars\n\na rusty {noun}\n")
    config = configure(f"evaluation.prompts=file:{path}")
    assert [(p.text, p.kind) for p in config.evaluation.prompts] == [
        ("a photo of {subject} on Mars", "custom"), ("a rusty {noun}", "custom"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a photo of {subject}\n- '{subject} at sea'\n", {"custom": 2}),
        ("scene:\n  - a photo of {subject}\nstyle:\n  - a drawing of {subject}\n", {"scene": 1, "style": 1}),
        ("version: 3\nprompts:\n  mine:\n    - a photo of {subject}\n", {"mine": 1}),
    ],
)
def test_a_yaml_file_is_a_list_or_lists_by_kind(tmp_path: Path, text: str, expected: dict[str, int]) -> None:
    (tmp_path / "p.yaml").write_text(text)
    assert count_kinds(configure(f"evaluation.prompts=file:{tmp_path / 'p.yaml'}")) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "a photo of {subject}\na {colour} {subject}\n", r"p.txt, line 2: .*\{colour\}"),
        ("p.txt", "a photo of a dog\n", r"line 1: .*lacks \{subject\}"),
        ("p.txt", "# nothing\n", "has 0 prompts"),
        ("p.yaml", "- a photo of {subject}\n-\n  - nested\n", "line 3: is no text"),
        ("p.yaml", "scene: a photo of {subject}\n", "line 1: give a list"),
        ("p.yaml", "- {subject} on the moon\n", "p.yaml is no YAML"),
        ("p.yaml", "scene:\n- a photo of {subject}\nstyle:\n- a {x} of {subject}\n", r"line 4: .*\{x\}"),
        ("p.txt", "\x1b[2J {subject}\n", "line 1: is not one line"),
    ],
)
def test_a_prompt_file_with_a_mistake_gives_one_line_naming_line_and_placeholder(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        configure(f"evaluation.prompts=file:{tmp_path / name}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_set_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        configure(f"evaluation.prompts=file:{tmp_path / 'none.txt'}")
    with pytest.raises(ConfigError, match="the sets are quick, standard, thorough, dreambench, all"):
        configure("evaluation.prompts=set:best")
    with pytest.raises(ConfigError, match="give a list of templates, file:PATH, or set:NAME"):
        configure("evaluation.prompts=prompts.txt")


def test_dreambenchs_own_file_is_read_for_each_kind_of_subject(tmp_path: Path) -> None:
    def rows(num: int, word: str) -> str:
        listed = ",\n".join(f"'a {word}{i} {{0}} {{1}} here'.format(unique_token, class_token)" for i in range(num))
        return f"prompt_list = [\n{listed}\n]\n"

    path = tmp_path / "prompts_and_classes.txt"
    path.write_text(f"Classes\n\nPrompts\n\nObject Prompts\n\n{rows(25, 'o')}\nLive Subject Prompts\n\n{rows(25, 'l')}")
    found = {kind: resolve_prompts(f"file:{path}", class_noun="x", subject_kind=kind) for kind in KINDS}
    assert found["object"][0] == {"text": "a o0 {noun} here", "kind": "scene"}
    assert [row["kind"] for row in found["living"]] == ["scene"] * 10 + ["accessory"] * 10 + ["property"] * 5
    assert write_subject_prompt(found["living"][0]["text"], identifier_token="sks", class_noun="cat") == (
        "a l0 sks cat here"
    )
    path.write_text(f"Object Prompts\n{rows(24, 'o')}\nLive Subject Prompts\n")
    with pytest.raises(ConfigError, match="has 24 prompts below 'Object Prompts', not 25"):
        resolve_prompts(f"file:{path}", class_noun="mug")


def test_a_caption_file_of_dreambench_plus_has_nine_prompts_of_three_kinds(tmp_path: Path) -> None:
    path = tmp_path / "00.txt"
    path.write_text("Tin Robot\n" + "".join(f"Scene {i} with a tin robot in it\n" for i in range(9)))
    found = resolve_prompts(f"file:{path}", class_noun="robot")
    assert [row["kind"] for row in found] == ["scene"] * 4 + ["style"] * 3 + ["imaginative"] * 2
    assert found[0]["text"] == "Scene 0 with a {noun} in it"
    path.write_text("Tin Robot\n" + "".join(f"Scene {i}\n" for i in range(9)))
    with pytest.raises(ConfigError, match=r"line 2: .*lacks \{subject\}"):
        resolve_prompts(f"file:{path}", class_noun="robot")


def test_a_request_may_name_a_set_and_a_prompt_file_within_the_allowed_folders(tmp_path: Path) -> None:
    def ask(value: object) -> RunConfig:
        settings = {"output_dir": str(tmp_path / "runs"), "evaluation.prompts": value}
        request = RunRequest.model_validate({"class_noun": "dog", "source": str(tmp_path), "settings": settings})
        return compile_request(request, roots=(tmp_path,))

    (tmp_path / "p.txt").write_text("{subject}\n")
    assert len(ask(f"file:{tmp_path / 'p.txt'}").evaluation.prompts) == 1
    assert len(ask("set:quick").evaluation.prompts) == 3
    assert ask(["{subject}"]).evaluation.prompts[0].kind == "custom"
    (tmp_path / "link.txt").symlink_to("/etc/hostname")
    for path in ("file:/etc/hostname", "file:../../etc/hostname", f"file:{tmp_path / 'link.txt'}", "/etc/hostname"):
        with pytest.raises(ConfigError, match=r"evaluation.prompts: .*outside the allowed folders"):
            ask(path)


@pytest.mark.parametrize(
    "prompts", ['["a {subject}","b {noun}","a {noun}"]', '["a {subject}","b {noun}","a  {subject}"]']
)
def test_prompts_that_are_the_same_after_filling_in_are_refused_with_their_positions(prompts: str) -> None:
    with pytest.raises(ConfigError, match="prompts 1 and 3 are the same after filling in"):
        configure(f"evaluation.prompts={prompts}")
