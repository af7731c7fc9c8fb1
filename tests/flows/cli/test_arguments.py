"""Shell completion, as shells ask for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli_sandbox import LIKENESS, ROOT


def complete(words: list[str], folder: Path, *, shell: str = "bash") -> list[str]:
    """Return what a shell is offered for the last word."""
    variables = {
        "bash": {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)},
        "fish": {"_TYPER_COMPLETE_ARGS": " ".join(words), "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    environment = {
        **os.environ, **variables, "PYTHONPATH": str(ROOT), "_LIKENESS_COMPLETE": f"complete_{shell}",
    }  # fmt: skip
    done = subprocess.run(LIKENESS, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["likeness", "pen"], ["pending"]),
        (["likeness", "run", "training.lora.ra"], ["training.lora.rank="]),
        (["likeness", "run", "--dry"], ["--dry-run"]),
        (["likeness", "run", "trac"], ["tracking=mlflow", "tracking=none"]),
        # bash splits words at the sign
        (["likeness", "run", "tracking", "="], ["mlflow", "none"]),
        (["likeness", "run", "seed=1", "tracking", "=", "m"], ["mlflow"]),
        (["likeness", "run", "seed", "=", "1"], []),
    ],
)
def test_commands_options_and_config_groups_are_completed(tmp_path: Path, words: list[str], offered: list[str]) -> None:
    assert complete(words, tmp_path) == offered


def test_completion_works_in_shells_that_do_not_split_words_at_equals(tmp_path: Path) -> None:
    assert complete(["likeness", "run", "store=s"], tmp_path, shell="fish") == ["store=s3"]


def test_names_of_runs_are_completed(tmp_path: Path) -> None:
    for name in ("20260101-fish-aaaa", "20260102-fish-bbbb"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "request.json").touch()
    (tmp_path / "out" / "work").mkdir()
    words = ["likeness", "report", "--output-dir", "out", ""]
    assert complete(words, tmp_path) == ["latest", "20260102-fish-bbbb", "20260101-fish-aaaa"]


def test_names_of_sweeps_are_completed_where_they_are_compared(tmp_path: Path) -> None:
    (tmp_path / "runs" / "sweeps").mkdir(parents=True)
    (tmp_path / "runs" / "sweeps" / "sweep-1a2b.journal").touch()
    assert complete(["likeness", "compare", "sw"], tmp_path) == ["sweep-1a2b"]
    assert complete(["likeness", "report", "sw"], tmp_path) == []


def test_the_completion_script_is_printed(tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m flows.cli.main --show-completion; exit $?"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "complete -o default -F _likeness_completion likeness" in done.stdout
