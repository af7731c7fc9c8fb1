"""The results of a scoreboard: means over subjects, differences, findings, and preferred methods by subject."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from flows.runs.promotion import load_evaluated
from flows.runs.records import read_run
from flows.scoreboard.cells import Result
from flows.scoreboard.plan import BASE, Direction, Plan
from flows.sweeps.outcome import compute_interval
from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Estimate
from tasks.manifests.subject import SubjectSet
from tasks.services.store.base import Store
from tasks.services.store.open import open_store
from tasks.stage.cache import find_manifest

if TYPE_CHECKING:
    from tasks.evaluation.comparison import Candidate
    from tasks.intervals import Pooled

Key = tuple[str, str, int]
"""Method, subject and training seed."""
Metrics = Mapping[str, "Pooled"]
"""A method's values on a subject by metric, over its training seeds."""
MIN_SUBJECTS = 3
"""From here on an interval is over subjects; for fewer it is over the prompts of these subjects."""
Verdict = Literal["holds", "opposite", "undecided", "not measured"]


@dataclass(frozen=True)
class Loaded:
    """A finished cell: its evaluation, and a photo of its subject."""

    store: Store
    candidate: "Candidate"
    photo: ObjectRef


@dataclass(frozen=True)
class Row:
    """A method: means over subjects, and differences to the reference, by metric."""

    method: str
    num_models: int
    means: dict[str, Estimate] = field(default_factory=dict)
    differences: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What was found of a published finding."""

    direction: Direction
    metric: str
    difference: Estimate | None
    verdict: Verdict


@dataclass(frozen=True)
class Preference:
    """One subject: the methods that no other one beats in DINO or CLIP-T without loss in the other."""

    subject: str
    preferred: tuple[str, ...]
    gains: dict[str, dict[str, Estimate]]
    """Difference to the base model by method, then metric."""
    beaten: dict[str, tuple[str, ...]]
    """By method, which others beat it."""


@dataclass(frozen=True)
class Standings:
    """All tables of a scoreboard."""

    metrics: tuple[str, ...]
    ceiling: dict[str, Estimate]
    """Among real photos, mean over subjects."""
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    preferences: tuple[Preference, ...]


def rank(models: Mapping[Key, Loaded], plan: Plan) -> Standings:
    """Return the tables of the finished cells."""
    from tasks.evaluation.comparison import find_range, pool_candidate

    candidates = {key: loaded.candidate for key, loaded in models.items()}
    # The base model's samples are the same beside every model of a subject.
    bases = {
        (BASE, subject, seed): replace(candidate, side="base")
        for (method, subject, seed), candidate in candidates.items()
        if method == plan.reference
    }
    found: dict[str, dict[str, list[Candidate]]] = defaultdict(lambda: defaultdict(list))
    for (method, subject, _), candidate in {**bases, **candidates}.items():
        found[method][subject].append(candidate)
    tables = {
        method: {name: pool_candidate(replace(own[0], replicates=tuple(own[1:]))) for name, own in by.items()}
        for method, by in found.items()
    }
    metrics = dict.fromkeys(metric for table in tables.values() for own in table.values() for metric in own)
    reference = tables.get(plan.reference, {})
    rows = tuple(
        Row(
            method,
            sum(map(len, found[method].values())),
            {key: mean.within(find_range(key)) for key, mean in collect(metrics, table).items()},
            {} if method == plan.reference else collect(metrics, differ(table, reference)),
        )
        for method, table in tables.items()
    )
    return Standings(
        tuple(metrics),
        average_ceilings(bases),
        rows,
        tuple(check(direction, tables) for direction in plan.directions),
        tuple(prefer(subject, tables) for subject in dict.fromkeys(subject for _, subject, _ in models)),
    )


def load_models(results: Sequence[Result]) -> dict[Key, Loaded]:
    """Return the evaluations of finished cells. Raises ConfigError where samples are missing."""
    return {result.cell.key: load_model(result.folder) for result in results if result.folder is not None}


def load_model(folder: Path) -> Loaded:
    """Return a finished run's evaluation. Raises ConfigError where its samples are missing."""
    run = read_run(folder)
    store = open_store(run.config.store)
    keys = {stage: run.find_stage_key(stage) for stage in run.summary.stages}
    candidate = load_evaluated(store, run.summary.run_id, keys)
    subject = find_manifest(store, SubjectSet, stage="subject", key=keys["subject"])
    assert subject is not None  # `load_evaluated` has read it
    return Loaded(store, candidate, subject.images[0].image)


def differ(table: Mapping[str, Metrics], reference: Mapping[str, Metrics]) -> dict[str, dict[str, "Pooled"]]:
    """Return a method less another, by subject and metric, for the prompts and seeds that both have."""
    from tasks.intervals import subtract_pooled

    found: dict[str, dict[str, Pooled]] = {}
    for subject in table.keys() & reference.keys():
        shared = [metric for metric in table[subject] if metric in reference[subject]]
        pairs = {metric: subtract_pooled(table[subject][metric], reference[subject][metric]) for metric in shared}
        found[subject] = {metric: pooled for metric, pooled in pairs.items() if pooled.values}
    return found


def collect(metrics: Iterable[str], table: Mapping[str, Metrics]) -> dict[str, Estimate]:
    """Return the mean over subjects of each metric that some of them have."""
    rows = {metric: {name: own[metric] for name, own in table.items() if metric in own} for metric in metrics}
    return {metric: estimate(by_subject) for metric, by_subject in rows.items() if by_subject}


def estimate(by_subject: Mapping[str, "Pooled"]) -> Estimate:
    """Return the mean over subjects with its 95 % interval.

    From three subjects on, Student's t over their means, so that it holds for other subjects too; each subject has
    trainings of its own, so the variance between subjects contains that between trainings, also with one training
    seed. For fewer, over their prompts and training seeds, so that it holds for these subjects alone.
    """
    if len(by_subject) < MIN_SUBJECTS:
        return estimate_prompts(by_subject)
    rows = [[value for row in own.values.values() for value in row.values()] for own in by_subject.values()]
    means = [fmean(row) for row in rows]
    low, high = compute_interval(means)
    return Estimate(mean=fmean(means), low=low, high=high, num=len(means))


def estimate_prompts(by_subject: Mapping[str, "Pooled"]) -> Estimate:
    """Return the mean over all prompts of these subjects, with an interval for other prompts and trainings of them."""
    from tasks.intervals import add_training_variance, estimate_samples

    counts = {name: sum(map(len, own.values.values())) for name, own in by_subject.items()}
    values = {f"{name} {prompt}": row for name, own in by_subject.items() for prompt, row in own.values.items()}
    trainings = [
        tuple(mean * counts[name] / sum(counts.values()) for mean in means)  # as much as the subject counts in the mean
        for name, own in by_subject.items()
        for means in own.trainings
    ]
    return add_training_variance(estimate_samples(values), trainings)


def check(direction: Direction, tables: Mapping[str, Mapping[str, Metrics]]) -> Finding:
    """Return whether a published finding holds here."""
    pairs = differ(tables.get(direction.method, {}), tables.get(direction.reference, {}))
    for metric in direction.metrics:
        found = collect([metric], pairs).get(metric)
        if found is None:
            continue
        verdict: Verdict = "undecided"
        if found.is_decided:
            verdict = "holds" if (found.mean > 0) == (direction.expected == "higher") else "opposite"
        return Finding(direction, metric, found, verdict)
    return Finding(direction, direction.metrics[0], None, "not measured")


def prefer(subject: str, tables: Mapping[str, Mapping[str, Metrics]]) -> Preference:
    """Return which methods no other one beats on a subject, by the paired comparison over its prompts."""
    from tasks.evaluation.comparison import HEADLINE, is_better
    from tasks.intervals import estimate_pooled, subtract_pooled

    own = {method: table[subject] for method, table in tables.items() if subject in table}

    def compare(method: str, other: str) -> dict[str, Estimate]:
        shared = [key for key in HEADLINE if key in own[method] and key in own[other]]
        pairs = {key: subtract_pooled(own[method][key], own[other][key]) for key in shared}
        return {key: estimate_pooled(pooled) for key, pooled in pairs.items() if pooled.values}

    beaten = {
        method: tuple(other for other in own if other != method and is_better(compare(other, method))) for method in own
    }
    preferred = tuple(method for method, others in beaten.items() if not others)
    gains = {method: compare(method, BASE) for method in own if method != BASE and BASE in own}
    return Preference(subject, preferred, gains, beaten)


def average_ceilings(candidates: Mapping[Key, "Candidate"]) -> dict[str, Estimate]:
    """Return each metric among real photos, as the mean over subjects.

    Of the reference's evaluations alone: CLIP-T compares photos with the class noun, which another may get wrong.
    """
    from tasks.evaluation.comparison import find_ceiling

    by_subject = {subject: each for (_, subject, _), each in candidates.items()}
    names = dict.fromkeys(name for each in by_subject.values() for name in each.evaluation.ceiling.model_dump())
    found = {name: [find_ceiling([each], name) for each in by_subject.values()] for name in names}
    return {name: average_subjects([each for each in found[name] if each is not None]) for name in names}


def average_subjects(found: Sequence[Estimate]) -> Estimate:
    """Return the mean over subjects: from three on by Student's t, for fewer with an interval for these alone."""
    mean, num = fmean(each.mean for each in found), len(found)
    if num >= MIN_SUBJECTS:
        low, high = compute_interval([each.mean for each in found])
        return Estimate(mean=mean, low=low, high=high, num=num)
    halves = [None if each.low is None else each.mean - each.low for each in found]
    if None in halves:
        return Estimate(mean=mean, num=num)
    half = math.hypot(*(each for each in halves if each is not None)) / num
    return Estimate(mean=mean, low=mean - half, high=mean + half, num=num)
