"""Every metric of every sample, and their means with intervals: over all prompts, by prompt and by kind."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tasks.errors import ConfigError, LikenessError, first_line
from tasks.evaluation.metrics import Features, MetricFunction, find_functions, measure_ceiling
from tasks.evaluation.own_metrics import OwnMetric, read_values
from tasks.intervals import estimate_samples, subtract
from tasks.manifests.evaluation import (
    CeilingMetrics,
    DriftMetrics,
    Estimate,
    PromptRow,
    Sample,
    Side,
    SubjectMetrics,
    Table,
)
from tasks.metrics import METRICS, Level, Metric

SIDES: tuple[Side, ...] = ("base", "tuned")
DRIFT = tuple(DriftMetrics.model_fields)


@dataclass(frozen=True)
class Measured:
    """All numbers of one evaluation."""

    metrics: dict[Side, SubjectMetrics]
    drift: dict[Side, DriftMetrics]
    ceiling: CeilingMetrics
    sample_metrics: dict[str, SubjectMetrics]
    class_metrics: dict[str, dict[str, float]]
    estimates: Table
    kinds: dict[str, Table]
    prompts: tuple[PromptRow, ...]


@dataclass(frozen=True)
class Registry:
    """The metrics with their functions: the project's own, and those of other packages."""

    metrics: dict[str, Metric] = field(default_factory=lambda: dict(METRICS))
    functions: dict[str, MetricFunction] = field(default_factory=find_functions)

    def extended(self, own: Mapping[str, OwnMetric]) -> "Registry":
        """Return a registry with metrics of other packages too."""
        return Registry(
            {**self.metrics, **{name: each.metric for name, each in own.items()}},
            {**self.functions, **{name: each.measure for name, each in own.items()}},
        )

    def at(self, level: Level) -> list[str]:
        """Return the names of a level's metrics."""
        return [name for name, metric in self.metrics.items() if metric.level == level]


def measure_all(
    samples: Sequence[Sample], features: Features, photos: Features, *, registry: Registry | None = None
) -> Measured:
    """Compute every metric; `features` are those of the samples, by index."""
    registry = registry or Registry()
    values = measure_each(samples, features, photos, registry=registry)
    estimates = {name: estimate_sides(by_key, samples) for name, by_key in values.items()}
    # A metric among the samples of a prompt lacks a side where the safety checker left single ones.
    whole = {name: by_side for name, by_side in estimates.items() if all(side in by_side for side in SIDES)}
    own = {name: by_side for name, by_side in whole.items() if name not in DRIFT}
    subject = [sample for sample in samples if sample.kind == "subject"]
    of_prompts = {name: by_key for name, by_key in values.items() if registry.metrics[name].level != "class"}

    def tabulate(rows: list[Sample]) -> Table:
        return {name: estimate_sides(by_key, rows) for name, by_key in of_prompts.items()}

    ceiling = measure_ceiling(photos)
    templates = dict.fromkeys(sample.template for sample in subject)
    kinds = dict.fromkeys(sample.prompt_kind for sample in subject)
    return Measured(
        metrics={side: SubjectMetrics(**{name: by_side[side].mean for name, by_side in own.items()}) for side in SIDES},
        drift={side: DriftMetrics(**{n: whole[n][side].mean for n in DRIFT if n in whole}) for side in SIDES},
        ceiling=CeilingMetrics(**{name: found.mean for name, found in ceiling.items()}),
        sample_metrics={key: SubjectMetrics(**found) for key, found in turn(values, registry.at("sample")).items()},
        class_metrics=turn(values, registry.at("class")),
        estimates={name: by_side | find_ceiling(name, ceiling) for name, by_side in estimates.items()},
        kinds={kind: tabulate([sample for sample in subject if sample.prompt_kind == kind]) for kind in kinds},
        prompts=tuple(
            PromptRow(template=template, kind=rows[0].prompt_kind, values=tabulate(rows))
            for template in templates
            if (rows := [sample for sample in subject if sample.template == template])
        ),
    )


def find_ceiling(name: str, ceiling: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Return what a metric's estimates have beside both sides: that of the photos, where it is measured on them."""
    return {"ceiling": ceiling[name]} if name in ceiling else {}


def measure_each(
    samples: Sequence[Sample], features: Features, photos: Features, *, registry: Registry
) -> dict[str, dict[str, float]]:
    """Return each metric's value of each sample that it is measured on, by object key; without unmeasured metrics."""
    found: dict[str, dict[str, float]] = {}
    for name, metric in registry.metrics.items():
        values: dict[str, float] = {}
        num_missing = 0
        for rows in group_samples(samples, metric.level):
            measured = call(name, registry.functions[name], (features.take(rows), photos))
            if measured is None:
                num_missing += 1
            else:
                values |= dict(zip([samples[row].image.key for row in rows], measured, strict=True))
        if values and num_missing and name not in METRICS:
            raise ConfigError(f"metric {name} returned None for {num_missing} groups of samples, but not for all")
        if values:
            found[name] = values
    return found


def call(name: str, function: MetricFunction, arguments: tuple[Features, Features]) -> list[float] | None:
    """Return a metric's values as plain numbers. Raises ConfigError for a metric that fails."""
    try:
        measured = function(*arguments)
        # Inside: a generator runs while it is read.
        return None if measured is None else read_values(name, measured, num=len(arguments[0].dino))
    except LikenessError:
        raise
    except Exception as error:  # a metric of another package may raise anything
        raise ConfigError(f"metric {name} failed: {type(error).__name__}: {first_line(error)}") from error


def group_samples(samples: Sequence[Sample], level: Level) -> Iterable[list[int]]:
    """Return the indices of samples that are measured together."""
    if level == "sample":
        rows = [row for row, sample in enumerate(samples) if sample.kind != "class"]
        return [rows] if rows else []
    kind = "class" if level == "class" else "subject"
    groups: dict[tuple[Side, str], list[int]] = defaultdict(list)
    for row, sample in enumerate(samples):
        if sample.kind == kind:
            groups[sample.side, sample.template].append(row)
    return groups.values()


def estimate_sides(values: Mapping[str, float], samples: Iterable[Sample]) -> dict[str, Estimate]:
    """Return the means of both sides and of their difference, paired by prompt and seed.

    Class samples of several seeds are independent of each other, those of one prompt of the subject are a cluster.
    """
    sides: dict[str, dict[str, dict[int, float]]] = {side: defaultdict(dict) for side in SIDES}
    for sample in samples:
        if sample.kind != "candidate" and sample.image.key in values:
            sides[sample.side][sample.template][sample.seed] = values[sample.image.key]
    found = {side: estimate_samples(by_prompt) for side, by_prompt in sides.items() if by_prompt}
    gain = subtract(sides["tuned"], sides["base"])
    return {**found, **({"gain": estimate_samples(gain)} if gain else {})}


def turn(values: Mapping[str, Mapping[str, float]], names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return the named metrics by sample instead of by metric."""
    turned: dict[str, dict[str, float]] = defaultdict(dict)
    for name in names:
        for key, value in values.get(name, {}).items():
            turned[key][name] = value
    return dict(turned)
