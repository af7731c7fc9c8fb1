"""Commands in the document: Prefect's parser accepts them, and what they name exists."""

import re
import shlex
import uuid
from pathlib import Path

import pytest
from prefect.cli._app import _app

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "deployments/README.md").read_text()


def list_commands() -> list[str]:
    """Return the command lines of the document's blocks and its inline code, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
    return [re.split(r"\s+#|\s+&$", line)[0] for line in (*lines, *inline)]


PREFECT = sorted(
    {found[1] for line in list_commands() if (found := re.search(r"(?:^|/|=\S+ )prefect ((?:--|[a-z]).*)", line))}
)


@pytest.mark.parametrize("command", PREFECT)
def test_prefect_accepts_a_command_of_the_document(command: str) -> None:
    command = command.replace("SCHEDULE_ID", str(uuid.uuid4()))
    words = [word for word in shlex.split(command) if word != "--no-prompt"]  # an option of all commands
    _app.parse_args(words, exit_on_error=False, print_error=False)


def test_the_parser_of_prefect_refuses_an_option_that_does_not_exist() -> None:
    with pytest.raises(Exception, match="Unknown option"):
        _app.parse_args(["work-pool", "create", "x", "--kind", "docker"], exit_on_error=False, print_error=False)
    assert len(PREFECT) > 8


def test_every_file_in_a_command_exists() -> None:
    made = {"deployments/images/digests.env", "deployments/compose.env"}
    named = {word for line in list_commands() for word in re.findall(r"\bdeployments/[\w./-]+", line)} - made
    assert "deployments/images/Dockerfile" in named and "deployments/pools/kubernetes.json" in named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    modules = {name for line in list_commands() for name in re.findall(r"-m (deployments[\w.]+)", line)}
    assert modules and all((ROOT / f"{name.replace('.', '/')}.py").is_file() for name in modules)


def test_every_anchor_leads_to_a_heading() -> None:
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= anchors
