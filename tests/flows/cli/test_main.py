"""What the command line says to wrong input: one line, an exit code, nothing half done."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.cli_sandbox import CliSandbox
from tests.support.tiny import draw_photos


@pytest.fixture
def place(tmp_path: Path, sandbox: CliSandbox) -> CliSandbox:
    return replace(sandbox, folder=tmp_path)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["training.lerning_rate=1"], 2, "ConfigError: unknown setting 'training.lerning_rate'; did you mean"),
        (["training.learning_rate=nan"], 2, "ConfigError: training.learning_rate"),
        (
            ["subject.source=missing", "subject.class_noun=fish"],
            2,
            "ConfigError: subject.source=missing is not a folder",
        ),
        (["subject.source=empty", "subject.class_noun=fish"], 3, "SubjectRejected: 0 good photos in empty, 3 needed"),
        (["subject.source=two", "subject.class_noun=fish"], 3, "SubjectRejected: 2 good photos in two, 3 needed"),
        (["subject.source=two"], 2, "ConfigError: subject.class_noun is not set"),
        (["output_dir=file/runs"], 2, "ConfigError: cannot write to"),
        (["llm=openai"], 2, "ConfigError: OPENAI_API_KEY is not set"),
        (["tracking.uri=http://127.0.0.1:9"], 4, "ServiceUnavailable: tracking at http://127.0.0.1:9 does not answer"),
        (["scoring.labels=none.csv"], 2, "ConfigError: scoring.labels=none.csv is not a file"),
    ],
)
def test_wrong_input_gets_one_line(place: CliSandbox, words: list[str], code: int, message: str) -> None:
    (place.folder / "empty").mkdir()
    (place.folder / "file").write_text("")
    draw_photos(place.folder / "two", num=2)
    done = place.run(*words)
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(message)


def test_help_teaches(place: CliSandbox) -> None:
    text = place.likeness("--help").stdout
    for word in ("run", "report", "generate", "estimate", "runs", "sweep", "examples:", "subject.class_noun="):
        assert word in text


def test_commands_on_no_runs_say_so(place: CliSandbox) -> None:
    assert "no runs in runs" in place.likeness("runs").stdout
    done = place.likeness("report")
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: no run 'latest' in runs")
    assert place.likeness("runs", "--json").stdout.strip() == "[]"
