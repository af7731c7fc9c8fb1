"""What the README says there is, is there."""

import re
from pathlib import Path

import pytest

from conf.groups import GROUPS, list_options
from flows.cli.app import app, register_commands

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("group", [group for group in GROUPS.values() if group not in ("subject", "experiment")])
def test_the_readme_lists_every_option_of_a_group(group: str) -> None:
    row = re.search(rf"^\| `{group}` \| (.*) \|$", README, re.MULTILINE)
    assert row is not None
    missing = [option for option in list_options(group) if f"`{option}`" not in row[1]]
    assert missing in ([], ["auto"])


def test_every_command_that_a_readme_names_is_there() -> None:
    register_commands()
    commands = {command.name for command in app.registered_commands}
    assert {"run", "runs", "gc"} <= commands
    for path in (
        ROOT / "README.md",
        ROOT / "deployments/README.md",
        ROOT / "flows/README.md",
        ROOT / "CONTRIBUTING.md",
    ):
        named = set(re.findall(r"likeness ([a-z]+)\b(?! [a-z]+ [a-z]+ )", path.read_text()))
        wrong = {name for name in named if re.search(rf"[`\n]likeness {name}\b", path.read_text())} - commands
        assert not wrong, f"{path.name} names {wrong}"
