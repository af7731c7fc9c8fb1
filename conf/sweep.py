"""`SweepRequest`: a base request, the values and ranges to search, objectives and budgets."""

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from conf.compose import compile_request, describe_invalid, suggest
from conf.defaults import list_settings
from conf.overrides import parse_overrides, split_sweep
from conf.request import RunRequest, Value, check_setting, order_form
from conf.schema import RunConfig, find_kind, list_choices
from tasks.config_base import is_number
from tasks.errors import ConfigError
from tasks.manifests.evaluation import CeilingMetrics
from tasks.manifests.run_summary import RunSummary
from tasks.manifests.scoring import PairResult, SideScores
from tasks.metrics import METRICS
from tasks.redaction import show_value
from tasks.stage.cache import PREFIXES
from tasks.stage.digests import digest

MAX_TRIALS, MAX_PARAMETERS, MAX_SEEDS, MAX_PARALLEL = 1_000, 100, 50, 64
MAX_NUMBER = 1e15  # exact as a float, and within an integer setting's 64 bits
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})((?::[^:]*)*)")
RANGE_FORM = "LOW..HIGH, then :log, :int or :STEP, for example 1e-6..1e-4:log or 4..32:4"
DINO_X_CLIP_T = "dino_x_clip_t"
TUNED = ("metrics.tuned.", "scores.tuned.")
"""Sections whose figures have short names: `dino` is `metrics.tuned.dino`."""
MINIMIZED = ("seconds", "wall_seconds", "overhead_seconds", "cost_usd", "llm_calls", "training_steps", "pres", "copies")
"""Last parts of the names of figures that are minimized by default."""
OPEN_NAMES = re.compile(rf"(stages\.({'|'.join(PREFIXES)})\.counts|judge\.(alpha|spearman))\.\w+")
"""Figures whose names are known only once a run has finished."""


class Range(BaseModel):
    """Numbers between two ends, both included."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    low: float = Field(ge=-MAX_NUMBER, le=MAX_NUMBER, description="smallest value")
    high: float = Field(ge=-MAX_NUMBER, le=MAX_NUMBER, description="largest value")
    step: float | None = Field(None, gt=0, le=MAX_NUMBER, description="distance between values; empty: any value")
    log: bool = Field(False, description="sample on a logarithmic scale")
    integer: bool = Field(False, description="integers alone")

    @model_validator(mode="after")
    def check_ends(self) -> "Range":
        """Reject empty ranges, and scales and steps that do not fit the ends."""
        if self.low >= self.high:
            raise ValueError(f"the range {self} is empty: its low end must be below its high end")
        if self.log and self.low <= 0:
            raise ValueError(f"the logarithmic range {self} must start above 0; start it at a small positive number")
        if self.log and self.step is not None:
            raise ValueError(f"the range {self} has both log and a step; drop one of them")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"the range {self} is narrower than its step")
        if self.integer and not all(value.is_integer() for value in (self.low, self.high, self.step or 1.0)):
            raise ValueError(f"the integer range {self} has ends or a step that are no integers")
        return self

    def __str__(self) -> str:
        """Return the range as the command line writes it."""
        marks = [":log"] * self.log + [f":{show_number(self.step)}"] * (self.step is not None) + [":int"] * self.integer
        return f"{show_number(self.low)}..{show_number(self.high)}{''.join(marks)}"

    @property
    def count(self) -> float:
        """The number of values; infinite where neither a step nor integers limit it."""
        if self.step is None and not self.integer:
            return math.inf
        # Decimal: 0.3 / 0.1 is below 3 in binary.
        return int((to_decimal(self.high) - to_decimal(self.low)) / to_decimal(self.step or 1.0)) + 1

    def value(self, index: int) -> int | float:
        """Return the value of an index, from 0; only where `count` is finite."""
        value = to_decimal(self.low) + index * to_decimal(self.step or 1.0)
        return int(value) if self.integer else float(value)

    @property
    def top(self) -> int | float:
        """The largest value that is reached: the high end, or the last step before it."""
        return self.high if math.isinf(self.count) else self.value(int(self.count) - 1)


@dataclass(frozen=True)
class Objective:
    """A figure of a run's summary, and whether it is minimized."""

    name: str
    is_minimized: bool

    def __str__(self) -> str:
        """Return it as the command line writes it."""
        return f"{self.name}:{'min' if self.is_minimized else 'max'}"


class SweepRequest(BaseModel):
    """A base request and what to search."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, json_schema_extra=order_form)

    space: dict[str, list[Value]] = Field({}, max_length=MAX_PARAMETERS, description="setting: the values to try")
    ranges: dict[str, Range] = Field({}, max_length=MAX_PARAMETERS, description="setting: the range to sample from")
    sampler: Literal["auto", "tpe", "grid", "random", "nsga2"] = Field(
        "auto", description="auto: grid where it is finite and every combination is wanted, else tpe"
    )
    objectives: list[Annotated[str, Field(max_length=200)]] = Field(
        [DINO_X_CLIP_T], min_length=1, max_length=2, description="figures of the summary; two: a Pareto front"
    )
    num_trials: int = Field(0, ge=0, le=MAX_TRIALS, description="finished trials in all; 0: every combination")
    max_hours: float | None = Field(None, gt=0, le=24 * 365, description="hours of trials after which none starts")
    max_usd: float | None = Field(None, gt=0, le=1e9, description="cost of trials in USD after which none starts")
    num_seeds: int = Field(1, ge=1, le=MAX_SEEDS, description="runs of each setting; their mean is the objective")
    pruner: Literal["none", "median"] = Field("none", description="stops trials whose validation is below the median")
    num_parallel: int = Field(1, ge=1, le=MAX_PARALLEL, description="trials at once, on a work pool")
    publish_best: bool = Field(False, description="register the best trial's model; other trials register none")
    study: str = Field(
        "", pattern=r"^[A-Za-z0-9_-]{0,100}$", description="name to resume it by; empty: derived from the request"
    )
    base: RunRequest = Field(default_factory=RunRequest, description="what every trial shares")

    @field_validator("space")
    @classmethod
    def check_space(cls, space: dict[str, list[Value]]) -> dict[str, list[Value]]:
        """Reject names and values that no trial could set."""
        for key, values in space.items():
            if not values or len(values) > MAX_TRIALS:
                raise ValueError(f"{key[:200]!r}: {len(values):,} values to try, must be 1 to {MAX_TRIALS:,}")
            for value in values:
                check_setting(key, value)
        if sum(map(len, space.values())) > MAX_TRIALS:
            raise ValueError(f"more than {MAX_TRIALS:,} values to try over all settings")
        return space

    @field_validator("objectives")
    @classmethod
    def check_objectives(cls, objectives: list[str]) -> list[str]:
        """Reject figures that no summary has."""
        if len({parse_objective(text).name for text in objectives}) < len(objectives):
            raise ValueError("two objectives must be two different figures")
        return objectives

    @model_validator(mode="after")
    def check_search(self) -> "SweepRequest":
        """Reject searches without a setting, and options that exclude each other."""
        if not self.is_search and self.num_seeds == 1:
            raise ValueError(
                "no setting has several values; give one, for example training.learning_rate=1e-5,3e-5, "
                "or repeat one setting with --seeds N"
            )
        for key, searched in self.ranges.items():
            check_setting(key, searched.low)
        twice = sorted(set(self.space) & set(self.ranges))
        if twice:
            raise ValueError(f"{twice[0]} has both values and a range; give one of them")
        if len(self.objectives) > 1 and (self.publish_best or self.pruner != "none"):
            option = "publish_best" if self.publish_best else "pruner"
            raise ValueError(f"{option} needs one objective: a Pareto front has no single best trial")
        if self.num_seeds > 1 and "seed" in {*self.space, *self.ranges}:
            raise ValueError("seed is searched, so num_seeds cannot vary it too; drop one of them")
        return self

    @model_validator(mode="after")
    def check_repetition(self) -> "SweepRequest":
        """Reject options that choose among trials where one setting is repeated with several seeds."""
        default = {name: field.default for name, field in type(self).model_fields.items()}
        choosing = ("sampler", "num_trials", "max_hours", "max_usd", "pruner", "num_parallel")
        given = [name for name in choosing if getattr(self, name) != default[name]]
        if not self.is_search and given:
            raise ValueError(
                f"{given[0]} needs several trials, and seeds alone are one: give KEY=V1,V2, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def check_end(self) -> "SweepRequest":
        """Reject searches without an end, or with too many combinations."""
        open_ended = [key for key, searched in self.ranges.items() if math.isinf(searched.count)]
        if self.sampler == "grid" and open_ended:
            name, searched = open_ended[0], self.ranges[open_ended[0]]
            raise ValueError(
                f"sampler grid needs finite values, and {name}={searched} has none: add a step, as "
                f"{name}={show_number(searched.low)}..{show_number(searched.high)}:STEP, or choose sampler tpe"
            )
        if not self.is_grid and not (self.num_trials or self.max_hours or self.max_usd):
            reason = f"{open_ended[0]} is a range" if open_ended else f"sampler {self.sampler} repeats combinations"
            raise ValueError(f"the sweep has no end, since {reason}: set --trials, --hours or --usd")
        if self.is_grid and self.num_combinations > MAX_TRIALS:
            raise ValueError(
                f"{int(self.num_combinations):,} combinations, at most {MAX_TRIALS:,} are accepted; try fewer values"
            )
        return self

    @property
    def study_name(self) -> str:
        """The study's name: the same request resumes the same study."""
        if self.study:
            return self.study
        found = digest([self.base, self.space, self.ranges, self.list_objective_names(), self.num_seeds])[:10]
        return f"{'sweep' if self.is_search else 'seeds'}-{found}"

    @property
    def is_search(self) -> bool:
        """Whether there are settings to search; else one setting is repeated with several seeds."""
        return bool(self.space or self.ranges)

    def list_objective_names(self) -> list[str]:
        """Return the objectives with full names and directions."""
        return [str(parse_objective(text)) for text in self.objectives]

    @property
    def num_combinations(self) -> float:
        """The number of combinations; infinite for a range without a step."""
        return math.prod([*map(len, self.space.values()), *(searched.count for searched in self.ranges.values())])

    @property
    def is_grid(self) -> bool:
        """Whether combinations are enumerated."""
        if self.sampler != "auto":
            return self.sampler == "grid"
        # With at least as many trials as combinations, sampling would repeat some and miss others.
        is_covered = self.num_trials == 0 or self.num_trials >= self.num_combinations
        return not math.isinf(self.num_combinations) and is_covered

    @property
    def max_trials(self) -> int:
        """The number of finished trials at which the sweep ends."""
        if self.is_grid:
            return min(int(self.num_combinations), self.num_trials or MAX_TRIALS)
        return self.num_trials or MAX_TRIALS

    def combinations(self) -> list[dict[str, Value]]:
        """Return the settings of every trial of a grid."""
        values: dict[str, list[Value]] = dict(self.space)
        values |= {key: [r.value(index) for index in range(int(r.count))] for key, r in self.ranges.items()}
        return [dict(zip(values, found, strict=True)) for found in itertools.product(*values.values())]

    def make_trial(self, values: Mapping[str, Value]) -> RunRequest:
        """Return the request of one trial."""
        # Fields of a request take precedence over its settings, so a searched one is cleared.
        fields = {"seed": "seed", "source": "subject.source", "class_noun": "subject.class_noun"}
        cleared = {field: None for field, setting in fields.items() if setting in values}
        return self.base.model_copy(update={**cleared, "settings": {**self.base.settings, **values}})


def to_decimal(value: float) -> Decimal:
    """Return a number as the decimal that it is written as."""
    return Decimal(repr(value))


def show_number(value: float | None) -> str:
    """Return a number in its shortest exact form; integers without a point."""
    return "" if value is None else str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def list_figures() -> list[str]:
    """Return the names of all numbers of a run's summary that are known beforehand."""
    fields = RunSummary.model_fields.items()
    names = [name for name, field in fields if is_number(field.annotation) and name != "schema_version"]
    for section, own in (("metrics", METRICS), ("scores", SideScores.model_fields)):
        names += [f"{section}.{side}.{name}" for side in ("tuned", "base") for name in own]
    names += [f"metrics.ceiling.{name}" for name in CeilingMetrics.model_fields]
    names += [f"judge.pairs.{name}" for name in PairResult.model_fields]
    return names + [f"stages.{stage}.{name}" for stage in PREFIXES for name in ("seconds", "cost_usd")]


def parse_objective(text: str) -> Objective:
    """Return the figure of `NAME`, `NAME:min` or `NAME:max`.

    Raises:
        ValueError: no summary has such a figure; names the closest ones.

    """
    name, _, direction = text.partition(":")
    figures = list_figures()
    short = {figure.rsplit(".", 1)[-1]: figure for figure in reversed(figures) if figure.startswith(TUNED)}
    full = short.get(name, name)
    if full not in figures and full != DINO_X_CLIP_T and not OPEN_NAMES.fullmatch(full):
        raise ValueError(f"unknown objective {show_value(name)}{suggest_figures(name, [*short, *figures])}")
    if direction not in ("", "min", "max"):
        raise ValueError(f"objective {name}: {show_value(direction)} is no direction; write {name}:min or {name}:max")
    is_minimized = full.rsplit(".", 1)[-1] in MINIMIZED if not direction else direction == "min"
    return Objective(full, is_minimized)


def suggest_figures(name: str, figures: Iterable[str]) -> str:
    """Return the nearest names, as the end of a sentence."""
    near = difflib.get_close_matches(name, [DINO_X_CLIP_T, *figures], n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else "; flows/README.md lists the figures of a summary"


def parse_sweep(overrides: Iterable[str], options: Mapping[str, object] | None = None) -> SweepRequest:
    """Parse `key=v1,v2` and `key=LOW..HIGH` arguments, and fields of `SweepRequest`, into a sweep.

    Raises:
        ConfigError: an argument is invalid, or a value or an end of a range is out of its setting's bounds.

    """
    request = read_sweep(overrides, options or {})
    check_sweep(request)
    return request


def read_sweep(overrides: Iterable[str], options: Mapping[str, object]) -> SweepRequest:
    """Return a sweep whose values are not yet held to their settings' bounds. Raises ConfigError."""
    ranges: dict[str, Range] = {}
    others: list[str] = []
    for override in overrides:
        searched = parse_range(override)
        if searched is None:
            others.append(override)
            continue
        key = override.partition("=")[0]
        if key in ranges:
            raise ConfigError(f"{key} is given twice")
        ranges[key] = searched
    fixed, space = split_sweep(others)
    try:
        return SweepRequest.model_validate(
            {"base": parse_overrides(fixed), "space": space, "ranges": ranges, **options}
        )
    except ValidationError as error:
        raise ConfigError(describe_invalid(error)) from error


def parse_range(override: str) -> Range | None:
    """Return the range of `key=LOW..HIGH[:log][:int][:STEP]`; None for other values. Raises ConfigError."""
    key, _, text = override.partition("=")
    kind = find_kind(key)
    found = RANGE.fullmatch(text.strip())
    if found is None:
        if ".." in text and kind in ("integer", "number"):
            raise ConfigError(f"{key}: {show_value(text)} is no range: write {RANGE_FORM}")
        return None
    if kind == "unknown":
        raise ConfigError(f"unknown setting {show_value(key)}{suggest(key, list_settings())}")
    low, high, marks = found.groups()
    fields: dict[str, object] = {"low": float(low), "high": float(high), "integer": kind == "integer"}
    for mark in marks.split(":")[1:]:
        if mark in ("log", "int"):
            fields["log" if mark == "log" else "integer"] = True
        elif re.fullmatch(NUMBER, mark):
            fields["step"] = float(mark)
        else:
            raise ConfigError(f"{key}: {show_value(mark)} is no scale or step of a range: write {RANGE_FORM}")
    try:
        return Range.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{key}: {describe_invalid(error)}") from error


def check_sweep(request: SweepRequest, *, roots: tuple[Path, ...] | None = None) -> RunConfig:
    """Validate every value, and both ends of every range; return the base's configuration.

    Before the first trial is paid for, without trying every combination.

    Raises:
        ConfigError: names the setting; or an option needs a setting that the base lacks.

    """
    values: dict[str, list[Value]] = dict(request.space)
    for key, searched in request.ranges.items():
        kind = find_kind(key)
        if kind == "other":
            choices = ",".join(list_choices(key) or ("VALUE", "VALUE"))
            raise ConfigError(f"{key} is no number, so it has no range: give values, as {key}={choices}")
        if kind == "integer" and not searched.integer:
            raise ConfigError(f"{key} takes integers, and {searched} is no integer range")
        values[key] = [int(end) if searched.integer else end for end in (searched.low, searched.top)]
    config = compile_request(request.base, roots=roots)
    for index in range(max(map(len, values.values()), default=0)):
        together = {key: found[min(index, len(found) - 1)] for key, found in values.items()}
        try:
            compile_request(request.make_trial(together), roots=roots)
        except ConfigError:
            # One at a time: the error is to name the value, and values may only exclude each other.
            for key, value in together.items():
                compile_request(request.make_trial({key: value}), roots=roots)
    if request.publish_best and config.tracking.kind == "none":
        raise ConfigError("publish_best needs a registry: set tracking=mlflow")
    steps = "training.validation.validation_steps"
    if request.pruner != "none" and config.training.validation.validation_steps == 0 and steps not in values:
        raise ConfigError(f"pruner {request.pruner} needs intermediate values: set {steps} above 0")
    return config
