"""Sections of a configuration: the values of `conf/run.yaml`, some of them changed."""

import copy
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel

from conf.defaults import overlay_values, read_defaults
from conf.schema import RunConfig
from tasks.config_base import Section
from tasks.evaluation.prompt_sets import resolve_prompts
from tasks.services.llm.config import LlmConfig
from tasks.subject.config import SubjectConfig

Kind = TypeVar("Kind", bound=Section)


@cache
def find_section_defaults() -> dict[type[BaseModel], dict[str, Any]]:
    """Return the defaults of every section of `RunConfig` by class."""
    found: dict[type[BaseModel], dict[str, Any]] = {}

    def visit(model: type[BaseModel], values: dict[str, Any]) -> None:
        found[model] = values
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                visit(kind, values[name])

    values = copy.deepcopy(read_defaults())
    # Only the validator of the whole configuration reads a set.
    values["evaluation"]["prompts"] = resolve_prompts(values["evaluation"]["prompts"], class_noun="fish")
    visit(RunConfig, values)
    return found


def make_config(section: type[Kind], /, **changes: Any) -> Kind:
    """Return a section: the defaults overlaid with changes, a nested section's mapping key by key."""
    return section.model_validate(overlay_values(find_section_defaults()[section], changes))


def make_subject_config(**changes: Any) -> SubjectConfig:
    """Return the configuration of photos of a fish."""
    return make_config(SubjectConfig, **{"source": "x", "class_noun": "fish", **changes})


def make_llm_config(**changes: Any) -> LlmConfig:
    """Return a configuration of roles and profiles."""
    return make_config(LlmConfig, **changes)
