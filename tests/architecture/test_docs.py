"""What the README says there is, is there."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from conf.groups import GROUPS, list_options
from conf.schema import RunConfig
from conf.trust import list_rules
from flows.cli.app import app, register_commands

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("group", [group for group in GROUPS.values() if group not in ("subject", "experiment")])
def test_the_readme_lists_every_option_of_a_group(group: str) -> None:
    row = re.search(rf"^\| `{group}` \| (.*) \|$", README, re.MULTILINE)
    assert row is not None
    missing = [option for option in list_options(group) if f"`{option}`" not in row[1]]
    assert missing == []


def test_every_command_named_in_a_readme_exists() -> None:
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


DOCS = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *(p for top in ("flows", "tasks", "conf", "deployments") for p in (ROOT / top).rglob("*.md")),
    )
    if "weights/" not in path.as_posix()
)
DIFFUSERS_FILES = {"train_dreambooth.py", "train_dreambooth_lora.py"}
USER_FILES = {"subject.yaml"}
"""Files that people write; no settings of the section `subject`."""
SECTIONS = tuple(f"{name}." for name in RunConfig.model_fields)
OF_A_RUN = ("runs/", "report/", "model/", "build/", "<", "..", "-")
"""How names of files begin that runs make, or that stand for others."""


def list_quoted(path: Path) -> list[str]:
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
    return [text for text in quoted if text not in USER_FILES]


def list_commands(path: Path) -> list[str]:
    """Return every command line in a document's blocks and quotes, without comments."""
    text = path.read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    return [line.split("  #")[0] for line in (*blocks.splitlines(), *list_quoted(path))]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_setting_named_in_a_document_exists(path: Path) -> None:
    known = set(list_rules())
    sections = {name.rsplit(".", depth)[0] for name in known for depth in (1, 2)}
    named = set()
    for text in (*list_quoted(path), *(word for line in list_commands(path) for word in line.split())):
        name = re.split(r"[=\s:]", text)[0]
        if (
            name.startswith(SECTIONS)
            and re.fullmatch(r"[a-z_.]+", name)
            and not name.endswith((".py", ".json", ".csv"))
        ):
            named.add(name)
    wrong = {name for name in named if name not in known | sections and not name.startswith("llm.profiles.")}
    assert wrong == set()


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_path_named_in_a_document_exists(path: Path) -> None:
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", path.read_text())]
    missing = [link for link in links if link and "://" not in link and not (path.parent / link).exists()]
    files = [text for text in list_quoted(path) if re.fullmatch(r"[\w./-]+\.(py|yaml|toml|sh|lock|jinja)", text)]
    files = [name for name in files if not name.startswith(OF_A_RUN)]
    places = (path.parent, ROOT, ROOT / "tasks", ROOT / "deployments")
    found = [name for name in files if any((place / name).exists() for place in places)]
    bare = {name for name in files if "/" not in name and any((ROOT / "tasks").rglob(name))}  # one file per stage
    missing += sorted({*files} - {*found} - bare - DIFFUSERS_FILES)
    assert missing == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_module_run_in_a_document_exists(path: Path) -> None:
    named = {name for line in list_commands(path) for name in re.findall(r"-m ((?:tasks|tests|flows)\.[\w.]+)", line)}
    missing = [name for name in sorted(named) if find_spec(name) is None]
    assert missing == []
