"""Every command line of the documents is one that this version takes: its options exist, its settings compose."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from conf.compose import compile_request
from conf.overrides import parse_overrides
from flows.cli.app import EXAMPLES, app, register_commands
from flows.cli.main import main
from flows.cli.run import sweep

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "flows").rglob("*.md"),
                 *(ROOT / "deployments").rglob("*.md"), *(ROOT / "tasks").rglob("*.md"))
    if "weights" not in path.parts
]  # fmt: skip
SEARCHED = ("sweep", "run -m")
"""Commands whose settings are ranges and choices."""
IMPLIED = ["subject.source=photos", "subject.class_noun=dog", "store.bucket=bucket"]
"""What lines leave out that only show one setting, where the defaults are the demo's."""


def list_lines(path: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.split(r"\s+#|\s+&$", line)[0].removesuffix(" ...") for line in lines]


COMMANDS = sorted(
    {
        line.removeprefix("likeness ")
        for line in (*(line for path in DOCUMENTS for line in list_lines(path)), *(words for words, _ in EXAMPLES))
        if line.startswith("likeness ") and line != "likeness --help"
    }
)


def parse(line: str) -> list[str]:
    """Parse a command line as the terminal does, without running it; return its settings."""
    register_commands()
    name, *words = shlex.split(line)
    group = typer.main.get_command(app)
    command = group.commands[name]  # type: ignore[attr-defined]
    found = command.make_context(name, words)
    return [str(word) for word in found.params.get("settings") or ()]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_documents_is_accepted(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my.txt", "prompts_and_classes.txt"):  # named in prompts' settings
        Path(name).write_text("a photo of {subject}\n")
    settings = parse(line)
    if line.startswith(SEARCHED):
        monkeypatch.setattr(sweep, "run_study", lambda request: 0)
        assert main(shlex.split(line)) == 0
    elif settings:
        compile_request(parse_overrides([*IMPLIED, *settings]))


def test_an_option_or_a_setting_that_does_not_exist_is_refused() -> None:
    assert len(COMMANDS) > 50
    with pytest.raises(Exception, match="--brightness"):
        parse("generate latest fish --brightness 3")
    with pytest.raises(Exception, match="learning_speed"):
        compile_request(parse_overrides(parse("run training.learning_speed=1")))
