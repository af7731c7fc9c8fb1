"""Compare evaluated models: differences of every metric, paired by prompt and seed where both have them."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.errors import ConfigError
from tasks.intervals import (
    Pooled,
    Values,
    add_training_variance,
    estimate_pooled,
    estimate_unpaired,
    pool_trainings,
    subtract_pooled,
)
from tasks.manifests.evaluation import MIN_CLUSTERS, Estimate, Evaluation, Protocol, Side
from tasks.metrics import METRICS, Metric

JUDGE_TEXT = "mean grade of the judge, 0 to 4; higher is better"
JUDGED = {
    "concept_preservation": Metric("judge: subject", JUDGE_TEXT, "the same judge alone", range=(0, 4)),
    "prompt_following": Metric("judge: prompt", JUDGE_TEXT, "the same judge alone", range=(0, 4)),
    "image_quality": Metric("judge: image quality", JUDGE_TEXT, "the same judge alone", range=(0, 4)),
}
ANY = (-math.inf, math.inf)
HEADLINE = {"dino": "subject fidelity", "clip_t": "prompt fidelity"}
"""What the conclusion is about, by metric."""


class UnpairedError(ConfigError):
    """Differences can't be paired, but means can be compared."""


@dataclass(frozen=True)
class Candidate:
    """An evaluated model: its name, its evaluation, the photos by digest, and grades by sample where it was judged."""

    name: str
    evaluation: Evaluation
    photos: frozenset[str]
    grades: Mapping[str, Mapping[str, float]]
    """By axis, then by the sample's object key."""
    judge: str = ""
    side: Side = "tuned"
    """`base` compares what the base model makes of the same prompts and seeds."""
    replicates: tuple["Candidate", ...] = ()
    """The same setting with further training seeds; its values are pooled with theirs."""


@dataclass(frozen=True)
class MetricComparison:
    """One metric: the mean of every model, and the difference of all but the first to the first."""

    key: str
    metric: Metric
    means: tuple[Estimate, ...]
    differences: tuple[Estimate, ...]
    photos: Estimate | None = None
    """Among the first model's photos; None where the metric isn't measured on them, or another has other photos."""


@dataclass(frozen=True)
class Comparison:
    """All metrics, and what may be concluded from them."""

    names: tuple[str, ...]
    is_paired: bool
    metrics: tuple[MetricComparison, ...]
    notes: tuple[str, ...]
    conclusion: str


def compare(candidates: Sequence[Candidate], *, is_paired: bool = True) -> Comparison:
    """Compare every model with the first.

    Raises:
        UnpairedError: paired, but the models were measured on other photos, or share no prompt and seed.
        ConfigError: they were measured with other encoders.

    """
    first = candidates[0]
    differing = check_protocols(candidates)
    tables = [pool_candidate(candidate) for candidate in candidates]
    notes = [*differing, *(check_shared(candidates, tables) if is_paired else ())]
    if len({len(candidate.replicates) for candidate in candidates}) > 1:
        notes.append("the models have different numbers of training seeds: values are means over them")
    rows = []
    for key, metric in {**METRICS, **find_others(tables), **JUDGED}.items():
        if key in JUDGED and len({candidate.judge for candidate in candidates}) > 1:
            continue  # grades of different judges are no common scale
        if not all(key in table for table in tables):
            continue
        values = [table[key] for table in tables]
        differences = [measure_difference(other, values[0], is_paired=is_paired) for other in values[1:]]
        means = tuple(estimate_pooled(value).within(metric.range) for value in values)
        decided = tuple(filter(None, differences))
        rows.append(MetricComparison(key, metric, means, decided, find_ceiling(candidates, key)))
    rows = [row for row in rows if len(row.differences) == len(candidates) - 1]
    names = tuple(candidate.name for candidate in candidates)
    conclusions = [
        conclude(name, first.name, {row.key: row.differences[number] for row in rows})
        for number, name in enumerate(names[1:])
    ]
    return Comparison(
        names, is_paired, tuple(rows), tuple(notes), " ".join([*conclusions, limit(candidates, is_paired)])
    )


def find_ceiling(candidates: Sequence[Candidate], key: str) -> Estimate | None:
    """Return a metric among the photos that all models were measured on, by the first one's evaluation."""
    evaluation = candidates[0].evaluation
    mean = getattr(evaluation.ceiling, key, None)
    if mean is None or len({candidate.photos for candidate in candidates}) > 1:
        return None
    return evaluation.estimates.get(key, {}).get("ceiling", Estimate(mean=mean, num=0))


def find_others(tables: Sequence[Mapping[str, Pooled]]) -> dict[str, Metric]:
    """Return the metrics of other packages by name; they need not be installed to be compared."""
    names = sorted({name for table in tables for name in table} - {*METRICS, *JUDGED})
    return {
        name: Metric(name, "of another package", "runs with the same package", range=ANY, direction="none")
        for name in names
    }


def find_range(key: str) -> tuple[float, float]:
    """Return the range of a metric's values; that of another package's is unknown."""
    known = {**METRICS, **JUDGED}
    return known[key].range if key in known else ANY


def pool_candidate(candidate: Candidate) -> dict[str, Pooled]:
    """Return each metric over a model's training seeds. Raises ConfigError for an older evaluation."""
    return pool_metrics([collect_values(model) for model in (candidate, *candidate.replicates)])


def pool_metrics(models: Sequence[Mapping[str, Values]]) -> dict[str, Pooled]:
    """Return each metric that all trainings of a setting have."""
    shared = [key for key in models[0] if all(key in model for model in models)]
    pooled = {key: pool_trainings([model[key] for model in models]) for key in shared}
    return {key: found for key, found in pooled.items() if found.values}


def collect_values(candidate: Candidate) -> dict[str, Values]:
    """Return the value of each metric by prompt and seed. Raises ConfigError for an older evaluation."""
    evaluation = candidate.evaluation
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for sample in evaluation.samples:
        if sample.side != candidate.side or sample.kind == "candidate":
            continue
        key = sample.image.key
        if sample.kind == "subject" and not sample.template:
            raise ConfigError(f"{candidate.name} was evaluated by an earlier version of likeness; run it again")
        own = evaluation.sample_metrics.get(key)
        values = dict(own.model_dump() if own else evaluation.class_metrics.get(key, {}))
        values |= {axis: grades[key] for axis, grades in candidate.grades.items() if key in grades}
        for name, value in values.items():
            found[name][sample.template][sample.seed] = value
    for row in evaluation.prompts:  # metrics among the samples of a prompt have one value per prompt
        for name in METRICS:
            if METRICS[name].level == "prompt" and candidate.side in row.values.get(name, {}):
                found[name][row.template][0] = row.values[name][candidate.side].mean
    return dict(found)


def check_protocols(candidates: Sequence[Candidate]) -> list[str]:
    """Return notes on sampling settings, or versions of a set of prompts, that differ from those of the first model.

    Raises:
        ConfigError: metrics were measured with other encoders: their cosines have no common scale.

    """
    first, notes = candidates[0], []
    for candidate in candidates[1:]:
        own, reference = candidate.evaluation.protocol, first.evaluation.protocol
        if own.encoders and reference.encoders and own.encoders != reference.encoders:
            raise ConfigError(
                f"{candidate.name} and {first.name} were measured with other encoders (evaluation.encoders): none of "
                "their metrics compare; evaluate both with the same ones"
            )
        names = find_other_settings(own, reference)
        if names and own.sampling and reference.sampling:
            notes.append(f"{candidate.name} was sampled with other settings than {first.name}: {', '.join(names)}")
        one, other = candidate.evaluation.prompt_set, first.evaluation.prompt_set
        if one and other and one.name == other.name and one.version != other.version:
            notes.append(
                f"{candidate.name} was evaluated with version {one.version} of the prompts {one.name}, "
                f"{first.name} with version {other.version}"
            )
    return notes


def find_other_settings(own: Protocol, reference: Protocol) -> list[str]:
    """Return the names of sampling settings that differ, with both values."""
    names = sorted({*own.sampling, *reference.sampling})
    values = [(name, own.sampling.get(name, ""), reference.sampling.get(name, "")) for name in names]
    return [f"{name} {one or 'none'}, not {other or 'none'}" for name, one, other in values if one != other]


def check_shared(candidates: Sequence[Candidate], tables: Sequence[Mapping[str, Pooled]]) -> list[str]:
    """Return notes on what is shared in part. Raises UnpairedError where nothing can be paired."""
    first, notes = candidates[0], []
    drawn_values = [table["dino"].values if "dino" in table else {} for table in tables]
    draws = [{(prompt, seed) for prompt, row in values.items() for seed in row} for values in drawn_values]
    for candidate, drawn in zip(candidates[1:], draws[1:], strict=True):
        shared = draws[0] & drawn
        if candidate.photos != first.photos:
            raise UnpairedError(
                f"{candidate.name} was measured on other photos than {first.name}: differences can't be paired"
            )
        if not shared:
            raise UnpairedError(
                f"{candidate.name} and {first.name} share no prompt and seed: differences can't be paired"
            )
        if shared != draws[0] | drawn:
            notes.append(f"{candidate.name}: {len(shared)} samples of {len(drawn)} have the prompt and seed of another")
    return notes


def measure_difference(second: Pooled, first: Pooled, *, is_paired: bool) -> Estimate | None:
    """Return second less first; None where nothing is shared."""
    if not is_paired:
        found = estimate_unpaired(second.values, first.values)
        return add_training_variance(found, second.trainings + first.trainings)
    differences = subtract_pooled(second, first)
    return estimate_pooled(differences) if differences.values else None


def conclude(name: str, reference: str, differences: Mapping[str, Estimate]) -> str:
    """Return one sentence that says which headline differences are decided."""
    parts = []
    for key, meaning in HEADLINE.items():
        found = differences.get(key)
        if found is None:
            continue
        label = f"{METRICS[key].name} ({meaning})"
        if found.low is None and found.num >= MIN_CLUSTERS:
            parts.append(f"{label} differs by {found.mean:+.3f} on every prompt alike")
        elif found.low is None or found.high is None:
            parts.append(f"{label} differs by {found.mean:+.3f} over {found.num} prompts, too few for an interval")
        elif found.is_decided:
            word = "higher" if found.mean > 0 else "lower"
            parts.append(f"{label} is {word} by {abs(found.mean):.3f} [{found.low:+.3f}, {found.high:+.3f}]")
        else:
            parts.append(f"{label} is inconclusive at {found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")
    copies = differences.get("copies")
    if copies is not None and copies.is_decided and copies.mean > 0:
        parts.append("more of its samples are near-duplicates of photos, so its fidelity is partly copying")
    text = f"{name} against {reference}: {'; '.join(parts)}"
    return f"{text}; {judge_headline(differences)}."


def is_better(differences: Mapping[str, Estimate]) -> bool:
    """Whether a model is better in a headline metric and worse in none, beyond the intervals."""
    found = [differences[key] for key in HEADLINE if key in differences]
    signs = {each.mean > 0 for each in found if each.is_decided}
    return signs == {True}


def judge_headline(differences: Mapping[str, Estimate]) -> str:
    """Return which of two models is better, as far as the headline metrics decide it."""
    found = [differences[key] for key in HEADLINE if key in differences]
    if any(each.low is None for each in found) or not found:
        return "inconclusive"
    signs = {each.mean > 0 for each in found if each.is_decided}
    if not signs:
        return "no significant difference"
    if len(signs) == 2:
        return "it trades one for the other, so neither is better in both"
    return "it is the better of the two" if signs == {True} else "it is the worse of the two"


def limit(candidates: Sequence[Candidate], is_paired: bool) -> str:
    """Return what may not be concluded."""
    single = [candidate.name for candidate in candidates if not candidate.replicates]
    how = "" if is_paired else " Unpaired means also differ by their prompts and seeds."
    return (
        f"Valid for this subject and similar prompts. {limit_trainings(single, len(candidates))} "
        f"Not corrected for multiple comparisons.{how}"
    )


def limit_trainings(single: Sequence[str], num: int) -> str:
    """Return what intervals say of other trainings, where some of the settings were trained with one seed."""
    if not single:
        return "Intervals contain the variance between training seeds: they hold for other trainings of each setting."
    what = "training-seed variance is not in the intervals"
    if len(single) == num:
        return f"One training seed per model compares models, not settings: {what}."
    return f"One training seed of {', '.join(single)} stands for a model, not a setting: its {what}."
