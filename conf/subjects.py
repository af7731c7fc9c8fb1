"""`ManyRequest`: one run per subject; and `subject.yaml`, which describes one subject beside its photos."""

from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from conf.compose import describe_invalid
from conf.groups import FIELDS
from conf.overrides import override_request
from conf.request import RunRequest, Value, check_setting, check_string, order_form
from tasks.errors import ConfigError, first_line

SUBJECT_FILE = "subject.yaml"
MAX_SUBJECTS, MAX_FILE_BYTES = 10_000, 64_000
Schema = TypeVar("Schema", bound=BaseModel)
TAKEN = ("source", "subject.source", "subject")
"""Names that a subject's file may not set: its photos lie beside it."""


class ManyRequest(BaseModel):
    """Which subjects, and what their runs share."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=order_form)

    subjects: str = Field(
        "store:subjects/",
        max_length=4_000,
        description="a CSV file, a folder of subject folders, or store:PREFIX/ in the object store",
    )
    wait: bool = Field(
        True, description="follow the runs to their ends; false: submit new subjects and return, as an inbox does"
    )
    retry_failed: bool = Field(True, description="run subjects again whose last run failed")
    settle_seconds: int = Field(
        30,
        ge=0,
        le=86_400,
        description="leave a folder for later whose files are younger, in seconds: it is still being written",
    )
    base: RunRequest = Field(default_factory=RunRequest, description="what all runs share")

    @field_validator("subjects")
    @classmethod
    def check_subjects(cls, value: str) -> str:
        """Refuse control characters and empty names."""
        check_string("subjects", value)
        if not value.strip():
            raise ValueError("name a CSV file, a folder, or store:PREFIX/")
        return value


class SubjectFile(BaseModel):
    """What `subject.yaml` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    class_noun: str = Field(max_length=60)
    photos: list[str] = Field(default_factory=list, max_length=1_000)
    """Names of the photos; the folder is complete when all of them are there. Empty: not said."""
    settings: dict[str, Value] = Field(default_factory=dict, max_length=500)
    """Settings and config groups, as on the command line."""

    @field_validator("settings", mode="before")
    @classmethod
    def read_nulls(cls, settings: object) -> object:
        """Read a plain `null` as none: the file's scalars arrive as text."""
        if not isinstance(settings, dict):
            return settings
        return {key: None if value in ("null", "~") else value for key, value in settings.items()}

    @field_validator("settings")
    @classmethod
    def check_settings(cls, settings: dict[str, Value]) -> dict[str, Value]:
        """Refuse names and values that no run could set."""
        for key, value in settings.items():
            if key not in FIELDS:
                check_setting(key, value)
            elif not isinstance(value, str):
                raise ValueError(f"{key}: name one option of the config group")
            if key in TAKEN:
                raise ValueError(f"{key} is not set here: the photos lie beside {SUBJECT_FILE}")
        return settings


def parse_subject_file(data: bytes) -> SubjectFile:
    """Return a parsed `subject.yaml`. Raises ConfigError for anything else."""
    return parse_yaml(data, SubjectFile, name=SUBJECT_FILE)


def parse_yaml(data: bytes, schema: type[Schema], *, name: str) -> Schema:
    """Return a file of YAML as a model. Raises ConfigError, with the file's name, for anything else."""
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{name} has {len(data):,} bytes, at most {MAX_FILE_BYTES:,} are read")
    try:
        text = data.decode("utf-8-sig")
        # A few aliases can stand for gigabytes, and nothing here needs one.
        if any(isinstance(token, yaml.AnchorToken | yaml.AliasToken) for token in yaml.scan(text)):
            raise ConfigError(f"{name}: anchors and aliases are not accepted")
        # Every scalar as text: YAML's own types raise errors of all kinds, and the schema knows the right ones.
        plain = yaml.load(text, Loader=yaml.BaseLoader)
        return schema.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(f"{name}: {describe_invalid(error)}") from error
    # ValueError: not UTF-8; RecursionError: deep nesting; TypeError: a list as a key.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{name} is not YAML: {first_line(error)}") from error


def make_request(base: RunRequest, *, source: str, class_noun: str, settings: dict[str, Value]) -> RunRequest:
    """Return the request of one subject: the base, with a subject's photos, noun and settings. Raises ConfigError."""
    request = override_request(base, [f"{key}={value}" for key, value in settings.items() if key in FIELDS])
    plain = {key: value for key, value in settings.items() if key not in FIELDS}
    own = {"source": source, "class_noun": class_noun, "settings": {**request.settings, **plain}}
    try:
        return RunRequest(**{**dict(request), **own})
    except ValidationError as error:
        raise ConfigError(describe_invalid(error)) from error
