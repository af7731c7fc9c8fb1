"""Metrics of other packages: the entry point group `likeness.metrics`.

An entry point's name is the metric's key; it names a function `(samples, photos) -> values`, one number per sample, or
an `OwnMetric` with its description. Installed means measured: version and name are part of the stage's key.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from tasks.errors import ConfigError, first_line
from tasks.metrics import METRICS, Metric

if TYPE_CHECKING:
    from tasks.evaluation.metrics import MetricFunction

GROUP = "likeness.metrics"


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
        if entry.name in METRICS or names.count(entry.name) > 1:
            raise ConfigError(f"metric {entry.name} of {describe(entry)} has the name of another metric; rename it")
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


def check_values(name: str, values: Sequence[float], *, num: int) -> None:
    """Raise ConfigError unless a metric returned one finite number per sample."""
    if len(values) != num or not all(abs(value) < float("inf") for value in values):
        raise ConfigError(f"metric {name} returned {len(values)} values for {num} samples, or one that is not finite")


def describe(entry: EntryPoint) -> str:
    """Return a metric's package and version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
