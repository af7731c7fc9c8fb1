"""Prompts that are refused, in whatever spelling, and the many that are not."""

from pathlib import Path

import pytest

from tasks.errors import ConfigError
from tasks.publishing.prompt_policy import VARIABLE, check_prompt


@pytest.mark.parametrize(
    "prompt",
    [
        "a nude child", "A NAKED Girl on a beach", "sexy schoolgirl", "n4ked ch1ld", "náked gírl", "na\u200bked boy",
        "two toddlers, topless", "girl without-clothes", "an undressed teenager", "portrait of a woman, nude",
        "nudity, people at the beach", "ｎａｋｅｄ kid", "porn of a celebrity", "n@ked boys!",
    ],
)  # fmt: skip
def test_nudity_of_persons_and_sexual_contexts_of_minors_are_refused(prompt: str) -> None:
    with pytest.raises(ConfigError, match="the prompt is refused") as caught:
        check_prompt(prompt)
    assert prompt not in str(caught.value)


@pytest.mark.parametrize(
    "prompt",
    [
        "a photo of sks fish in the snow", "a girl with a dog", "a naked mole rat", "sks dog as a baby, watercolor",
        "a nude colored handbag", "portrait of a woman in a red coat", "a person from Essex", "4 people and 5 cats",
        "a child's drawing of a house", "a bare tree", "",
    ],
)  # fmt: skip
def test_ordinary_prompts_pass(prompt: str) -> None:
    check_prompt(prompt)


def test_an_own_policy_replaces_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "policy.yaml"
    own.write_text("words: {brands: [acme]}\nrules: {a competitor: [brands]}\n")
    monkeypatch.setenv(VARIABLE, str(own))
    with pytest.raises(ConfigError, match="a competitor"):
        check_prompt("an Acme anvil")
    check_prompt("a nude person")


@pytest.mark.parametrize("text", ["rules: {x: [none]}", "rules: {x: []}", "rulez: {}", "[", "words: 3"])
def test_a_policy_that_could_not_work_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    own = tmp_path / "policy.yaml"
    own.write_text(text)
    monkeypatch.setenv(VARIABLE, str(own))
    with pytest.raises(ConfigError, match=VARIABLE) as caught:
        check_prompt("a fish")
    assert "\n" not in str(caught.value)
