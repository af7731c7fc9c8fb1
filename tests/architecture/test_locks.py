"""The locks: complete, hashed, without releases known to be bad."""

import re
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "deployments"
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-cuda.lock")
BANNED = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3"), "litellm": ("1.82.7", "1.82.8")}


def entries(name: str) -> dict[str, str]:
    text = (FOLDER / name).read_text()
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\\n]+)(.*\n(?:    .*\n)*)", text, re.MULTILINE)
    return {f"{name}=={version}": rest for name, version, rest in found}


@pytest.mark.parametrize("name", LOCKS)
def test_every_entry_is_pinned_and_hashed(name: str) -> None:
    found = entries(name)
    assert found
    for entry, rest in found.items():
        assert "--hash=sha256:" in rest, entry
        package, version = entry.split("==")
        assert version not in BANNED.get(package, ()), entry


def test_locks_contain_no_registry_url() -> None:
    for name in LOCKS:
        assert "://" not in (FOLDER / name).read_text()


@pytest.mark.parametrize("name", LOCKS[:2])
def test_installed_versions_match_the_lock(name: str) -> None:
    wrong = []
    for entry in entries(name):
        package, version = entry.split("==")
        try:
            installed = metadata.version(package).split("+")[0]
        except metadata.PackageNotFoundError:
            continue  # for another system or Python
        versions = [e.split("==")[1] for e in entries(name) if e.split("==")[0] == package]
        if installed not in versions:
            wrong.append(f"{package} {installed}, not {version}")
    assert not wrong


def test_every_direct_dependency_is_locked() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {entry.split("==")[0].lower() for entry in entries("requirements.lock")}
    for requirement in project["dependencies"]:
        assert re.split(r"[<>=\[]", requirement)[0].lower() in locked, requirement
