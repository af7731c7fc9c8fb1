"""What the command line says to wrong input: one line, an exit code, nothing half done."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from flows.cli.app import PANELS, app, register_commands
from flows.cli.main import main
from tests.support.cli_sandbox import ROOT, CliSandbox
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
        (["tracking.uri=http://127.0.0.1:abc"], 2, "ConfigError: tracking at http://127.0.0.1:abc is no MLflow server"),
        (["scoring.labels=none.csv"], 2, "ConfigError: scoring.labels=none.csv is not a file"),
    ],
)
def test_invalid_input_is_a_one_line_error(place: CliSandbox, words: list[str], code: int, message: str) -> None:
    (place.folder / "empty").mkdir()
    (place.folder / "file").write_text("")
    draw_photos(place.folder / "two", num=2)
    done = place.run(*words)
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], "UsageError: No such command 'fly'; see `likeness --help`"),
        (["rnu"], "UsageError: No such command 'rnu'. Did you mean"),
        (["--fly"], "UsageError: No such option: --fly; see `likeness --help`"),
        (["run", "--fly"], "UsageError: No such option: --fly; see `likeness run --help`"),
        (["generate"], "UsageError: Missing argument 'MODEL'; see `likeness generate --help`"),
        (["generate", "latest", "x", "--steps", "0"], "UsageError: Invalid value for '--steps'"),
        (["jobs", "dance"], "UsageError: Invalid value for 'ACTION': 'dance' is not one of 'list'"),
        (["fly\x1b[31m\nSecond line"], "UsageError: No such command 'fly"),
    ],
)
def test_a_usage_error_is_a_one_line_error(capfd: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(words) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(message)
    assert shown.err.count("\n") == 1
    assert "\x1b" not in shown.err


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.cli.results.runs.find_run", interrupt)
    assert main(["report"]) == 130
    assert capfd.readouterr().err == "stopped; run the same command again to resume\n"


def test_help_has_panels_examples_and_config_groups(place: CliSandbox) -> None:
    done = place.likeness("--help")
    for title in (*(f"{panel}:" for panel in PANELS), "Examples:", "Config groups (group=option, * is the default):"):
        assert title in done.stdout.splitlines()
    for word in ("run", "report", "generate", "estimate", "runs", "sweep", "pending", "gc", "subject.class_noun="):
        assert word in done.stdout
    assert "\x1b" not in done.stdout
    assert place.likeness().stdout == done.stdout


def test_help_lists_an_option_added_as_a_conf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"]) == 0
    assert "store                auto* | local | s3\n" in capfd.readouterr().out
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "ours.yaml").write_text("# @package _global_\n")
    monkeypatch.setenv("LIKENESS_CONF", str(tmp_path))
    for words in (["--help"], ["run", "--help"]):
        assert main(words) == 0
        assert "store                auto* | local | ours | s3\n" in capfd.readouterr().out


def test_every_command_is_in_a_panel(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capfd.readouterr().out
    register_commands()
    written = [
        name
        for path in (ROOT / "flows" / "cli").rglob("commands.py")
        for name in re.findall(r'@app\.command\("([\w-]+)"', path.read_text())
    ]
    assert sorted(str(command.name) for command in app.registered_commands) == sorted(written)
    for command in app.registered_commands:
        assert re.search(rf"^  {command.name} ", text, re.MULTILINE)


def test_the_version_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"likeness \d+\.\d+\.\d+\S*\n", capfd.readouterr().out)


def test_commands_report_an_output_folder_without_runs(place: CliSandbox) -> None:
    assert "no runs in runs" in place.likeness("runs").stdout
    done = place.likeness("report")
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: no run 'latest' in runs")
    assert place.likeness("runs", "--json").stdout.strip() == "[]"
