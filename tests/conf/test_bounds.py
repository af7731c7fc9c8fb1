"""Every number of a configuration has bounds: none reaches torch, numpy or a sleep that can't take it."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from conf.compose import compile_request
from conf.request import RunRequest
from conf.schema import RunConfig
from tasks.errors import ConfigError

UNBOUNDED = {
    "llm.budget_usd": "it is only compared; a request can't lift the operator's",
}
"""Numbers without an upper bound, with the reason. What profiles say is the operator's own (`llm.profiles`)."""


def list_numbers(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every numeric field by dotted name."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from list_numbers(kind, f"{prefix}{name}.")
        elif is_numeric(kind):
            yield f"{prefix}{name}", field


def is_numeric(kind: Any) -> bool:
    """Whether a type takes numbers, alone, in a union or in a tuple."""
    origin = get_origin(kind)
    if origin is Annotated:
        return is_numeric(get_args(kind)[0])
    if origin in (Union, UnionType, tuple):
        return any(is_numeric(part) for part in get_args(kind))
    return kind in (int, float)


def has(field: FieldInfo, *names: str) -> bool:
    """Whether a field carries one of these bounds."""
    return any(getattr(mark, name, None) is not None for mark in field.metadata for name in names)


def test_every_number_has_a_lower_and_an_upper_bound() -> None:
    numbers = dict(list_numbers(RunConfig))
    assert len(numbers) > 70
    assert not [name for name, field in numbers.items() if not has(field, "ge", "gt")]
    assert [name for name, field in numbers.items() if not has(field, "le", "lt")] == list(UNBOUNDED)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training.validation.sample_prompts", ()), ("evaluation.prompts", ()),
        ("training.num_threads", True), ("training.snr_gamma", True), ("seed", False),
        ("evaluation.seed", 2**63), ("prior.seed", 2**63), ("subject.max_pixels", 10**12),
        ("subject.working_side", 10**9),
        ("training.num_threads", 10**9), ("training.stall_seconds", 1e300), ("training.grace_seconds", 1e300),
        ("scoring.poll_seconds", 1e-300), ("scoring.max_wait_seconds", 1e300), ("subject.max_wait_seconds", 1e300),
        ("scoring.deadline_seconds", 1e300),
    ],
)  # fmt: skip
def test_an_out_of_range_number_raises_an_error_naming_the_setting(name: str, value: float) -> None:
    with pytest.raises((ConfigError, ValidationError), match=name):
        compile_request(RunRequest.model_validate({"settings": {name: value}}))


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, float("inf"), float("nan"), [1, 2**70], [float("-inf")]])
def test_a_non_finite_or_oversized_number_raises_an_error_naming_the_setting(value: Any) -> None:
    with pytest.raises(ValidationError, match=r"training\.alpha: .*(is out of range|is not a finite number)"):
        RunRequest.model_validate({"settings": {"training.alpha": value}})
