"""`RunRequest`: the common input of command line, deployment form, schedule and sweep; and that of `likeness evaluate`.

A request's values are data: plain strings, numbers and lists, without interpolation.
"""

import math
import re
from typing import Annotated, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.config import JsonDict

from conf.groups import OptionOf, read_default_options
from tasks.redaction import clean_text

Scalar = bool | int | float | str
Value = Scalar | None | list[Scalar]
OPTIONS = read_default_options()
MAX_SETTINGS, MAX_ITEMS, MAX_CHARACTERS = 500, 500, 4_000


def check_number(name: str, value: float) -> None:
    """Refuse numbers that are not finite or have more than 64 bits. Raises ValueError."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: {value} is not a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: a number of {value.bit_length()} bits is out of range")


def check_string(name: str, value: str) -> None:
    """Reject control characters and oversized strings. Raises ValueError."""
    if len(value) > MAX_CHARACTERS:
        raise ValueError(f"{name}: {len(value):,} characters, at most {MAX_CHARACTERS:,} are accepted")
    if clean_text(value) != value:
        raise ValueError(f"{name}: control characters are not accepted")


def check_setting(key: str, value: Value) -> None:
    """Refuse anything that is more than a dotted name and a plain value. Raises ValueError."""
    if len(key) > 200 or not re.fullmatch(r"[a-z][a-z0-9_]*(\.[A-Za-z0-9][A-Za-z0-9_-]*)*", key):
        raise ValueError(f"{key[:200]!r} is not a dotted name of a setting")
    items = value if isinstance(value, list) else [value]
    if len(items) > MAX_ITEMS:
        raise ValueError(f"{key}: {len(items):,} values, at most {MAX_ITEMS} are accepted")
    for item in items:
        if isinstance(item, str):
            check_string(key, item)
        elif isinstance(item, int | float):
            check_number(key, item)


def order_form(schema: JsonDict) -> None:
    """Prepare the JSON schema for Prefect's form: ordered as the class, bounds in words, no toggle of value and None.

    It sorts by `position` and puts fields without one first; it shows descriptions, and bounds once they are broken.
    """
    properties = cast(dict[str, JsonDict], schema["properties"])
    for position, field in enumerate(properties.values()):
        field["position"] = position
        choices = field.get("anyOf")
        if isinstance(choices, list) and {"type": "null"} in choices:
            choices.remove({"type": "null"})
            if len(choices) == 1:
                del field["anyOf"]
                field.update(cast(JsonDict, choices[0]))
            if field.get("default", 0) is None:
                del field["default"]
        if bounds := describe_bounds(field):
            field["description"] = f"{field['description']} ({bounds})"


def describe_bounds(field: JsonDict) -> str:
    """Return the bounds of a field in words; empty where it has none."""
    least, most = field.get("minimum"), field.get("maximum")
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    named = (
        (f"{least} to {most}" if least is not None and most is not None else None),
        (f"at least {least}" if least is not None and most is None else None),
        (f"at most {most}" if most is not None and least is None else None),
        (f"more than {above}" if above is not None else None),
        (f"less than {below}" if below is not None else None),
        (f"at most {field['maxLength']} characters" if "maxLength" in field else None),
    )
    return ", ".join(filter(None, named))


class RunRequest(BaseModel):
    """What to run. Every field has a default; with none set, it is the demo."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=order_form)

    source: str | None = Field(None, description="folder of 3-5 photos, or store:PREFIX in the object store")
    class_noun: str | None = Field(None, max_length=60, description="what the subject is, for example dog")
    subject: Annotated[str, OptionOf("subject")] = Field(
        OPTIONS["subject"], description="where photos come from, if no source is given"
    )
    diffusion: Annotated[str, OptionOf("diffusion")] = Field(OPTIONS["diffusion"], description="base model")
    experiment: Annotated[str, OptionOf("experiment")] = Field(
        OPTIONS["experiment"], description="a named set of changes to the defaults"
    )
    method: Annotated[str, OptionOf("training/method")] = Field(
        OPTIONS["training/method"],
        description="what is learned: all weights, adapters, a new token, or a token and one of these; "
        "auto: as the base model's preset says",
    )
    prior: Annotated[str, OptionOf("prior")] = Field(OPTIONS["prior"], description="prior preservation")
    evaluation: Annotated[str, OptionOf("evaluation")] = Field(OPTIONS["evaluation"], description="how much is sampled")
    encoders: Annotated[str, OptionOf("evaluation/encoders")] = Field(
        OPTIONS["evaluation/encoders"],
        description="encoders of the metrics; paper: of the DreamBooth paper; auto: as the base model's preset says",
    )
    llm: Annotated[str, OptionOf("llm")] = Field(OPTIONS["llm"], title="LLM", description="LLM provider")
    scoring: Annotated[str, OptionOf("scoring")] = Field(
        OPTIONS["scoring"], description="how the judge is called; auto: as the LLM provider allows"
    )
    publishing: Annotated[str, OptionOf("publishing")] = Field(
        OPTIONS["publishing"], description="where the model goes"
    )
    devices: Annotated[str, OptionOf("training/devices")] = Field(
        OPTIONS["training/devices"],
        description="of training and sampling: one GPU or the CPU, all GPUs of the machine, weights sharded over them, "
        "several machines",
    )
    store: Annotated[str, OptionOf("store")] = Field(
        OPTIONS["store"], description="where objects live; auto: in the worker's bucket, else in a folder"
    )
    tracking: Annotated[str, OptionOf("tracking")] = Field(OPTIONS["tracking"], description="where metrics are tracked")
    seed: int | None = Field(None, ge=0, le=2**31 - 1, description="seed of training; empty: the default")
    settings: dict[str, Value] = Field(
        default_factory=dict,
        max_length=MAX_SETTINGS,
        description='other settings by dotted name, as JSON, for example {"training.learning_rate": 2e-6}',
    )

    @field_validator("source", "class_noun", mode="before")
    @classmethod
    def read_empty_field(cls, value: object) -> object:
        """Take a form's empty field as no value."""
        return None if isinstance(value, str) and not value.strip() else value

    @field_validator("source", "class_noun")
    @classmethod
    def check_text(cls, value: str | None) -> str | None:
        """Refuse control characters and huge strings."""
        if value is not None:
            check_string("value", value)
        return value

    @field_validator("settings")
    @classmethod
    def check_settings(cls, settings: dict[str, Value]) -> dict[str, Value]:
        """Refuse anything that is more than a name and a plain value."""
        for key, value in settings.items():
            check_setting(key, value)
        return settings


class EvaluationRequest(BaseModel):
    """Which model, and the photos and settings that a run of the same subject has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        max_length=4_000,
        description="a diffusers folder; or a LoRA (diffusers or kohya keys) or textual-inversion embedding in "
        "safetensors, for the configured base model",
        json_schema_extra={"position": 0},
    )
    base: RunRequest = Field(
        default_factory=RunRequest,
        description="photos, class noun and settings, as of a run; those of training are not used",
        json_schema_extra={"position": 1},
    )

    @field_validator("model")
    @classmethod
    def check_model(cls, value: str) -> str:
        """Refuse control characters and an empty name."""
        check_string("model", value)
        if not value.strip():
            raise ValueError("name a folder or a file")
        return value
