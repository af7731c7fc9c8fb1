"""Metrics of other packages: the entry point group `likeness.metrics`.

An entry point's name is the metric's key; it names a function `(samples, photos) -> values`, one number per sample, or
an `OwnMetric` with its description. Installed means measured: version and name are part of the stage's key.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

import numpy as np

from tasks.errors import ConfigError, first_line
from tasks.manifests.evaluation import SubjectMetrics
from tasks.manifests.scoring import SideScores
from tasks.metrics import METRICS, Metric

if TYPE_CHECKING:
    from tasks.evaluation.metrics import MetricFunction

GROUP = "likeness.metrics"
MAX_VALUE = 1e12
"""Beyond, sums and squares of intervals lose all digits."""


@dataclass(frozen=True)
class OwnMetric:
    """A metric of another package with its description."""

    metric: Metric
    measure: "MetricFunction"


def list_entry_points() -> list[EntryPoint]:
    """Return the installed entry points, sorted by name. Raises ConfigError for a name that is taken."""
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    names = [entry.name for entry in found]
    for entry in found:
        if entry.name in SideScores.model_fields:
            raise ConfigError(f"metric {entry.name} of {describe(entry)} has the name of a judge's axis; rename it")
        if entry.name in METRICS or names.count(entry.name) > 1:
            raise ConfigError(f"metric {entry.name} of {describe(entry)} has the name of another metric; rename it")
        if hasattr(SubjectMetrics, entry.name):
            raise ConfigError(f"metric {entry.name} of {describe(entry)} has a reserved name; rename it")
        if not entry.name.isidentifier():
            raise ConfigError(f"metric {entry.name!r} of {describe(entry)}: its name must be a Python identifier")
    return found


def identify_own_metrics() -> list[str]:
    """Return name, package and version of every installed metric, for the cache key."""
    return [f"{entry.name} {describe(entry)}" for entry in list_entry_points()]


def load_own_metrics() -> dict[str, OwnMetric]:
    """Return the installed metrics by name. Raises ConfigError for one that can't be imported or called."""
    found = {}
    for entry in list_entry_points():
        try:
            loaded = entry.load()
        except Exception as error:  # whatever another package raises on import
            raise ConfigError(
                f"metric {entry.name} of {describe(entry)} can't be imported: {first_line(error)}"
            ) from error
        if not isinstance(loaded, OwnMetric):
            if not callable(loaded):
                raise ConfigError(f"metric {entry.name} of {describe(entry)} is no function ({entry.value})")
            text = (loaded.__doc__ or "no description").strip().splitlines()[0].rstrip(".")
            loaded = OwnMetric(Metric(entry.name, text, f"as {describe(entry)} says", direction="none"), loaded)
        found[entry.name] = loaded
    return found


def read_values(name: str, measured: object, *, num: int) -> list[float]:
    """Return what a metric returned as one plain number per sample.

    Raises:
        ConfigError: it is a single value, a table, holds something else than numbers, or numbers out of bounds.

    """
    prefix = f"metric {name} returned"
    shape = getattr(measured, "shape", None)
    if isinstance(measured, str | bytes) or not isinstance(measured, Iterable) or shape == ():
        raise ConfigError(f"{prefix} a single {type(measured).__name__}; return one number per sample")
    if shape is not None and len(shape) != 1:
        raise ConfigError(f"{prefix} an array of shape {tuple(shape)}; return one number per sample, shape ({num},)")
    values: list[object] = measured.tolist() if hasattr(measured, "tolist") else list(measured)
    if len(values) != num:
        raise ConfigError(f"{prefix} {len(values)} values for {num} samples; return one number per sample")
    return [read_value(prefix, value) for value in values]


def read_value(prefix: str, value: object) -> float:
    """Return one value as a plain number. Raises ConfigError."""
    try:
        if isinstance(value, str | bytes | complex | np.complexfloating):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{prefix} a {type(value).__name__} for a sample; return real numbers") from error
    if not math.isfinite(number):
        raise ConfigError(f"{prefix} {number}; return finite numbers")
    if abs(number) > MAX_VALUE:
        raise ConfigError(f"{prefix} {number:g}; return values of at most {MAX_VALUE:g}")
    return number


def describe(entry: EntryPoint) -> str:
    """Return a metric's package and version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
