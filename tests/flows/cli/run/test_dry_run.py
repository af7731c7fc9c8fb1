"""`likeness run --dry-run`: what a run would use, and nothing of it done."""

from pathlib import Path

import pytest
import yaml

from conf.compose import compile_request
from conf.overrides import parse_overrides
from flows.cli.main import main


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_dry_run_prints_yaml_below_the_differences_from_the_defaults(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["training.max_train_steps=7", "training.learning_rate=5e-5", "tracking=none"]
    assert main(["run", *words, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text) == compile_request(parse_overrides(words)).model_dump(mode="json")
    default = compile_request(parse_overrides([]))
    listed = [line for line in text.splitlines() if line.startswith("#   ")]
    assert f"#   training.max_train_steps: 7  (default {default.training.max_train_steps})" in listed
    assert "#   tracking.kind: none  (default mlflow)" in listed
    assert "#   publishing.is_registered: false  (default true)" in listed  # follows from the tracker
    assert len(listed) == 4
    assert list(empty_folder.iterdir()) == []


def test_the_default_configuration_lists_no_differences(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("0 values differ from the defaults")
    assert not lines[1].startswith("#")


def test_secrets_are_masked(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef")
    assert main(["run", "publishing.title=sk-0123456789abcdef", "subject.identifier_token=zwx", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "0123456789" not in text
    assert "publishing.title: ***" in text
    assert "identifier_token: zwx" in text


def test_a_wrong_configuration_is_refused(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "training.learning_rate=-1", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: training.learning_rate")
