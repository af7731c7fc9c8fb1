"""The plan of a scoreboard: which methods, subjects and seeds, and which findings are checked."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from conf.groups import CONFIG_DIR
from conf.overrides import parse_overrides
from conf.subjects import MAX_FILE_BYTES, parse_yaml
from tasks.errors import ConfigError
from tasks.metrics import METRICS

SHIPPED = CONFIG_DIR / "scoreboard.yaml"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]{0,59}")
BASE = "base"
"""The row of the base model."""
RESERVED = ("source", "class_noun", "subject", "seed", "output_dir", "subject.source", "subject.class_noun")
"""What the scoreboard itself sets."""
Words = Annotated[tuple[str, ...], Field(max_length=100)]


class Part(BaseModel):
    """A part of a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(Part):
    """How one row's models are trained."""

    settings: Words = ()
    class_noun: Literal["right", "wrong"] = "right"
    """`wrong`: the class noun of the next subject."""

    @field_validator("settings")
    @classmethod
    def check_words(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse words that no run could take."""
        return check_settings(words)


class Direction(Part):
    """A published finding: which of two methods has the higher metric."""

    claim: str = Field(min_length=1, max_length=200)
    method: str
    reference: str
    metrics: tuple[str, ...] = Field(min_length=1, max_length=9)
    """The first that was measured counts."""
    expected: Literal["higher", "lower"]


class Plan(Part):
    """What is run and compared."""

    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(min_length=1, max_length=100)
    """Of training."""
    drawn: tuple[str, ...] = Field((), max_length=100)
    settings: Words = ()
    reference: str
    methods: dict[str, Method] = Field(min_length=1, max_length=100)
    directions: tuple[Direction, ...] = Field((), max_length=100)

    @field_validator("settings")
    @classmethod
    def check_words(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse words that no run could take."""
        return check_settings(words)

    @field_validator("methods")
    @classmethod
    def check_names(cls, methods: dict[str, Method]) -> dict[str, Method]:
        """Refuse names that are no file names."""
        for name in methods:
            check_name("method", name)
        return methods

    @model_validator(mode="after")
    def check_references(self) -> "Plan":
        """Refuse rows that are compared and not run."""
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: the same seed twice")
        if self.reference not in self.methods:
            raise ValueError(f"reference: there is no method {self.reference}; there are {', '.join(self.methods)}")
        for each in self.directions:
            for name in (each.method, each.reference):
                if name not in self.methods:
                    raise ValueError(f"directions: there is no method {name}; there are {', '.join(self.methods)}")
            for name in each.metrics:
                if name not in METRICS:
                    raise ValueError(f"directions: there is no metric {name}; there are {', '.join(METRICS)}")
        return self

    def restrict(self, names: tuple[str, ...], num_seeds: int | None) -> "Plan":
        """Return the plan with some of its methods alone, and with a number of seeds. Raises ConfigError."""
        unknown = [name for name in names if name not in self.methods]
        if unknown:
            raise ConfigError(f"--methods: there is no method {unknown[0]}; there are {', '.join(self.methods)}")
        methods = {name: method for name, method in self.methods.items() if not names or name in names}
        seeds = self.seeds
        if num_seeds is not None:
            last = max(seeds)
            seeds = (*seeds, *range(last + 1, last + 1 + num_seeds))[:num_seeds]
        changes: dict[str, object] = {
            "methods": methods,
            "seeds": seeds,
            "reference": self.reference if self.reference in methods else next(iter(methods)),
            "directions": tuple(d for d in self.directions if {d.method, d.reference} <= methods.keys()),
        }
        return self.model_copy(update=changes)


def check_name(what: str, name: str) -> str:
    """Return a name that is a file name too. Raises ValueError."""
    if not NAME.fullmatch(name) or name == BASE:
        raise ValueError(f"{what} {name[:60]!r}: use letters, digits, + . _ - (and not {BASE!r})")
    return name


def check_settings(words: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what isn't a setting, and those of subject and seed. Raises ValueError."""
    try:
        parse_overrides(words)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    check_reserved(word.partition("=")[0] for word in words)
    return words


def check_reserved(names: Iterable[str]) -> None:
    """Refuse settings that the scoreboard itself sets. Raises ValueError."""
    taken = [name for name in names if name in RESERVED]
    if taken:
        raise ValueError(f"{taken[0]}: subjects, seeds and the folder are the scoreboard's own")


def read_plan(path: Path = SHIPPED) -> Plan:
    """Return a plan. Raises ConfigError, with the file's name."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no file; `likeness scoreboard` takes a plan like {SHIPPED.name}")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the plan {path} can't be read: {error.strerror}") from error
    return parse_yaml(data, Plan, name=path.name)
