"""`SweepRequest`: a base request and the values to try."""

import itertools
import math
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from conf.compose import compile_request, describe_invalid
from conf.overrides import parse_overrides, split_sweep
from conf.request import RunRequest, Value, check_setting
from tasks.errors import ConfigError
from tasks.stage.digests import digest

MAX_TRIALS, MAX_PARAMETERS = 1_000, 100


class SweepRequest(BaseModel):
    """A base request and the values to try."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: RunRequest = Field(default_factory=RunRequest, description="what every trial shares")
    space: dict[str, list[Value]] = Field(
        min_length=1, max_length=MAX_PARAMETERS, description="setting: the values to try"
    )
    num_trials: int = Field(0, ge=0, description="finished trials in all; 0: every combination")
    study: str = Field(
        "", pattern=r"^[A-Za-z0-9_-]*$", description="name to resume it by; empty: derived from the request"
    )
    objective: Literal["dino_x_clip_t", "dino", "clip_i", "clip_t", "concept_preservation"] = Field(
        "dino_x_clip_t", description="what is maximized, of the tuned model"
    )

    @field_validator("space")
    @classmethod
    def check_space(cls, space: dict[str, list[Value]]) -> dict[str, list[Value]]:
        """Reject names and values that no trial could set."""
        for key, values in space.items():
            if not values or len(values) > MAX_TRIALS:
                raise ValueError(f"{key[:200]!r}: {len(values):,} values to try, must be 1 to {MAX_TRIALS:,}")
            for value in values:
                check_setting(key, value)
        return space

    @model_validator(mode="after")
    def check_trials(self) -> "SweepRequest":
        """Reject more than MAX_TRIALS trials, before they are enumerated."""
        count = math.prod(map(len, self.space.values())) if self.is_grid else self.num_trials
        if count > MAX_TRIALS:
            raise ValueError(f"{count:,} combinations, at most {MAX_TRIALS:,} are accepted; try fewer values")
        return self

    @property
    def study_name(self) -> str:
        """Return the study's name: the same request resumes the same study."""
        return self.study or f"sweep-{digest([self.base, self.space, self.objective])[:10]}"

    @property
    def is_grid(self) -> bool:
        """Whether every combination is tried."""
        # With at least as many trials as combinations, sampling would repeat some and miss others.
        return self.num_trials == 0 or self.num_trials >= math.prod(map(len, self.space.values()))

    def combinations(self) -> list[dict[str, Value]]:
        """Return the settings of every trial of a grid."""
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*self.space.values())]

    def make_trial(self, values: dict[str, Value]) -> RunRequest:
        """Return the request of one trial."""
        return self.base.model_copy(update={"settings": {**self.base.settings, **values}})


def parse_sweep(overrides: Iterable[str], *, num_trials: int = 0, study: str = "") -> SweepRequest:
    """Parse `key=v1,v2` arguments into a sweep. Raises ConfigError for invalid values."""
    fixed, space = split_sweep(overrides)
    if not space:
        raise ConfigError("no setting has several values; give one, for example training.learning_rate=1e-5,3e-5")
    try:
        request = SweepRequest(base=parse_overrides(fixed), space=space, num_trials=num_trials, study=study)
    except ValidationError as error:
        raise ConfigError(describe_invalid(error)) from error
    # Each value alone, before the first trial is paid for: the number of combinations multiplies.
    for key, values in space.items():
        for value in values:
            compile_request(request.make_trial({key: value}))
    return request
