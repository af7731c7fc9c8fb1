"""Both files of deployments offer every flow with parameters that its form and its schedules accept."""

import importlib
import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[2]
FILES = ("prefect.yaml", "prefect-shared.yaml")
ASKED = {"evaluate-model": {"model": "x"}, "sweep-settings": {"space": {"seed": [1, 2]}}}
"""What a form asks for: it has no default."""
FLOWS = {path.stem.replace("_", "-") for path in (ROOT / "flows").glob("*.py") if path.stem != "__init__"}


def read(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((ROOT / "deployments" / name).read_text())["deployments"]
    return found


@pytest.fixture(autouse=True)
def with_shared_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKENESS_CONF", str(ROOT / "deployments" / "options"))


@pytest.mark.parametrize("name", FILES)
def test_every_flow_has_a_deployment(name: str) -> None:
    assert {each["name"] for each in read(name)} == FLOWS


@pytest.mark.parametrize("name", FILES)
def test_parameters_of_deployments_and_schedules_are_what_the_flow_takes(name: str) -> None:
    for each in read(name):
        module, _, function = each["entrypoint"].rpartition(".")
        flow = getattr(importlib.import_module(module), function)
        known, hints = inspect.signature(flow.fn).parameters, get_type_hints(flow.fn)
        for parameters in (each["parameters"], *(s.get("parameters", {}) for s in each.get("schedules", []))):
            assert parameters.keys() <= known.keys(), each["name"]
            # A default may lack what the form asks for; what it has is checked.
            for key, value in parameters.items():
                if isinstance(hints[key], type) and issubclass(hints[key], BaseModel):
                    hints[key].model_validate({**value, **ASKED.get(each["name"], {})})


def test_shared_deployments_use_the_shared_store_and_server() -> None:
    for each in read("prefect-shared.yaml"):
        request = each["parameters"].get("request")
        if request is not None:
            shared = request.get("base", request)
            assert (shared["store"], shared["tracking"]) == ("shared", "server"), each["name"]


def test_all_schedules_are_paused_until_a_person_starts_them() -> None:
    for name in FILES:
        assert all(s["active"] is False for each in read(name) for s in each.get("schedules", []))
