"""The base of every configuration section, and the rules for what a deployment's request may set.

Every string field, alone or in a list, states by its annotated type who may set it and which values it takes. A field
without a rule can't be set by a request; a test enumerates them.
"""

import re
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

from tasks.prompts import check_template
from tasks.redaction import clean_text

TEXT_LIMIT = 2_000
MAX_SEED = 2**63 - 1  # torch accepts up to 2**64 - 1, which leaves room for seeds counted up from this one
MAX_WAIT = 30 * 24 * 3600.0  # seconds


def is_number(annotation: object) -> bool:
    """Whether a field's type is a number, or a number or null."""
    return annotation in (int, float) or (
        get_origin(annotation) in (Union, UnionType)
        and all(part in (int, float, type(None)) for part in get_args(annotation))
    )


class Section(BaseModel):
    """A frozen section: unknown keys and numbers that are not finite are refused."""

    # Sections of RunConfig have no defaults: conf/run.yaml holds them all, and a test forbids a second place.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def refuse_booleans_for_numbers(cls, value: object, info: ValidationInfo) -> object:
        """Refuse `seed=true`, which pydantic would read as 1."""
        if isinstance(value, bool) and is_number(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("must be a number")
        return value


@dataclass(frozen=True)
class RequestRule:
    """What a request through a deployment may set a field to.

    operator_only: nothing, it is set on the worker's machine; path: a path below the allowed roots; photos: a path, or
    `store:PREFIX`; model: a path, or a hub repository; prompts: a list that the field's own validator accepts,
    `set:NAME`, or `file:` and a path; checked: whatever the field's own validator accepts.
    """

    kind: Literal["operator_only", "path", "photos", "model", "prompts", "checked"]


OPERATOR_ONLY = RequestRule("operator_only")


def check_text(value: str) -> str:
    """Return one line of printable text of at most TEXT_LIMIT characters. Raises ValueError for anything else."""
    if len(value) > TEXT_LIMIT:
        raise ValueError(f"is longer than {TEXT_LIMIT:,} characters")
    if clean_text(value, keep="") != value:
        raise ValueError("holds control characters; write one line of plain text")
    return value


def check_name(value: str) -> str:
    """Return a plain name of letters, digits and `. _ + -`, or an empty string. Raises ValueError for others."""
    if not re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9_.+-]{0,199})?", value):
        raise ValueError("must be a plain name of letters, digits and . _ + -")
    return value


def check_domain(value: str) -> str:
    """Return a host name with a top-level domain. Raises ValueError for anything else."""
    if not re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,63}", value):
        raise ValueError("must be a host name, for example wikipedia.org")
    return value


def check_photos(value: str) -> str:
    """Return a folder, or `store:PREFIX`. Raises ValueError for a prefix that could leave the store's root."""
    prefix = check_text(value).removeprefix("store:")
    is_plain = not prefix.startswith("/") and "\\" not in prefix and ".." not in prefix.split("/")
    if value.startswith("store:") and not (prefix and is_plain):
        raise ValueError("must be a folder, or store:PREFIX with a plain relative prefix")
    return value


def check_subject_template(value: str) -> str:
    """Return a prompt template with {subject} as its only placeholder. Raises ValueError for others."""
    return check_template(check_text(value), ("subject",), required=("subject",))


def check_class_template(value: str) -> str:
    """Return a prompt template with no placeholders but {article} and {class_noun}. Raises ValueError for others."""
    return check_template(check_text(value), ("article", "class_noun"))


CHECKED = RequestRule("checked")
OperatorText = Annotated[str, AfterValidator(check_text), OPERATOR_ONLY]
LocalPath = Annotated[str, AfterValidator(check_text), RequestRule("path")]
PhotoSource = Annotated[str, AfterValidator(check_photos), RequestRule("photos")]
ModelName = Annotated[str, AfterValidator(check_text), RequestRule("model")]
PlainText = Annotated[str, AfterValidator(check_text), CHECKED]
PlainName = Annotated[str, AfterValidator(check_name), CHECKED]
PlainNames = Annotated[tuple[Annotated[str, AfterValidator(check_name)], ...], CHECKED]
Domains = Annotated[tuple[Annotated[str, AfterValidator(check_domain)], ...], CHECKED]
SubjectTemplates = Annotated[tuple[Annotated[str, AfterValidator(check_subject_template)], ...], CHECKED]
ClassTemplate = Annotated[str, AfterValidator(check_class_template), CHECKED]

# Query parameters that hold no secret. Any other might, and would be stored and logged with the URL.
HARMLESS_PARAMETERS = frozenset({"api-version", "charset", "sslmode"})


def check_url(url: str | None) -> str | None:
    """Return a URL. Raises ValueError where it has a user name, a password or other than HARMLESS_PARAMETERS."""
    if not url:
        return url
    check_text(url)
    if re.search(r"://[^/?#]*@", url):
        raise ValueError("an address with a name or password would be stored and logged; use the environment")
    query = url.partition("?")[2].partition("#")[0]
    names = {part.partition("=")[0].lower() for part in query.split("&") if part}
    if not names <= HARMLESS_PARAMETERS:
        raise ValueError("an address with query parameters would be stored and logged; use the environment")
    return url
