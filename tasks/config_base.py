"""The base of every configuration section, and what a request may set in it.

Every string in the configuration, alone or in a list, says by its type who may set it and what it may be. A field
without such a mark can't be set by a request; a test enumerates them.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from tasks.prompts import check_template
from tasks.redaction import clean_text

TEXT_LIMIT = 2_000
MOST_SEED = 2**63 - 1  # torch takes twice that, so that a seed that is counted up from it is one too
MOST_WAIT = 30 * 24 * 3600.0  # seconds


class Section(BaseModel):
    """A frozen section: unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class RequestRule:
    """What a request through a deployment may put into a field.

    operator_only: nothing, it is set on the worker's machine; path: below the allowed roots; photos: as path, or
    `store:PREFIX`; model: as path, or a hub repository; checked: anything that the field's own validator takes.
    """

    kind: Literal["operator_only", "path", "photos", "model", "checked"]


OPERATOR_ONLY = RequestRule("operator_only")


def check_text(value: str) -> str:
    """Refuse what is more than one line of printable text."""
    if len(value) > TEXT_LIMIT:
        raise ValueError(f"is longer than {TEXT_LIMIT:,} characters")
    if clean_text(value, keep="") != value:
        raise ValueError("holds control characters; write one line of plain text")
    return value


def check_name(value: str) -> str:
    """Refuse what is more than a plain name: letters, digits and `. _ + -`."""
    if not re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9_.+-]{0,199})?", value):
        raise ValueError("must be a plain name of letters, digits and . _ + -")
    return value


def check_domain(value: str) -> str:
    """Refuse what is no host name."""
    if not re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,63}", value):
        raise ValueError("must be a host name, for example wikipedia.org")
    return value


def check_photos(value: str) -> str:
    """Refuse a prefix in the store that could leave its root."""
    prefix = check_text(value).removeprefix("store:")
    is_plain = not prefix.startswith("/") and "\\" not in prefix and ".." not in prefix.split("/")
    if value.startswith("store:") and not (prefix and is_plain):
        raise ValueError("must be a folder, or store:PREFIX with a plain relative prefix")
    return value


def check_subject_template(value: str) -> str:
    """Refuse a prompt template that lacks {subject} or holds anything else in braces."""
    return check_template(check_text(value), ("subject",), required=("subject",))


def check_class_template(value: str) -> str:
    """Refuse a prompt template with placeholders other than {article} and {class_noun}."""
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

# Query parameters that carry no secret; all others could, and would be stored and logged with the address.
HARMLESS_PARAMETERS = frozenset({"api-version", "charset", "sslmode"})


def check_url(url: str | None) -> str | None:
    """Return an address; raise ValueError where it carries a name, a password or query parameters."""
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
