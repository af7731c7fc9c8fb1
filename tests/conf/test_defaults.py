"""Defaults stand in `conf/run.yaml` alone."""

from collections.abc import Iterator

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from conf.compose import compile_request
from conf.defaults import fill_defaults, list_settings, overlay_values, read_defaults
from conf.groups import CONFIG_DIR, GROUPS, read_default_options
from conf.overrides import parse_overrides
from conf.request import RunRequest
from conf.schema import RunConfig
from conf.trust import list_rules
from tasks.config_base import Section


def list_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every field by dotted name, sections too; what lies in a mapping of profiles is given piecemeal."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from list_fields(kind, f"{prefix}{name}.")


def test_no_config_class_defines_a_default() -> None:
    assert not [name for name, field in list_fields(RunConfig) if not field.is_required()]


def test_a_default_in_a_config_class_is_detected() -> None:
    class Nested(Section):
        """A section."""

        steps: int = 3

    class Whole(Section):
        """A configuration."""

        nested: Nested
        seed: int

    assert [name for name, field in list_fields(Whole) if not field.is_required()] == ["nested.steps"]


def test_run_yaml_lists_exactly_the_known_settings() -> None:
    values = yaml.safe_load((CONFIG_DIR / "run.yaml").read_text())
    del values["defaults"]

    def leaves(section: dict[str, object], prefix: str = "") -> Iterator[str]:
        for name, value in section.items():
            if isinstance(value, dict) and f"{prefix}{name}" != "llm.profiles":
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    assert sorted(leaves(values)) == sorted(list_rules())


def test_every_setting_is_documented() -> None:
    leaves = {name: field for name, field in list_fields(RunConfig) if name in list_rules()}
    assert [name for name, field in leaves.items() if not field.description] == ["llm.profiles"]


def test_required_settings_have_no_default() -> None:
    assert "source" not in read_defaults()["subject"]
    assert "models" not in read_defaults()["llm"]


def test_overlay_values_merges_nested_mappings_by_key() -> None:
    assert overlay_values({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"c": 3}, "d": [2]}) == {
        "a": {"b": 1, "c": 3},
        "d": [2],
    }


@pytest.mark.parametrize("name", ["training", "seed"])
def test_a_stored_configuration_gets_defaults_for_settings_added_later(name: str) -> None:
    stored = compile_request(parse_overrides(["training.max_train_steps=7"])).model_dump(mode="json")
    older = {key: value for key, value in stored.items() if key != name}
    older["scoring"] = {key: value for key, value in stored["scoring"].items() if key != "num_pairs"}
    completed = RunConfig.model_validate(fill_defaults(older))
    assert completed.scoring.num_pairs == read_defaults()["scoring"]["num_pairs"]
    assert completed.training.max_train_steps == (800 if name == "training" else 7)


def test_the_default_options_of_a_request_are_those_of_run_yaml() -> None:
    listed = yaml.safe_load((CONFIG_DIR / "run.yaml").read_text())["defaults"]
    expected = {group: option for entry in listed if isinstance(entry, dict) for group, option in entry.items()}
    assert read_default_options() == expected
    assert {group: RunRequest.model_fields[field].default for field, group in GROUPS.items()} == expected


def test_every_setting_is_completed_by_its_dotted_name() -> None:
    names = set(list_settings())
    assert {"training.lora.rank", "subject.source", "evaluation.encoders.clip"} <= names
    assert names == set(list_rules())
