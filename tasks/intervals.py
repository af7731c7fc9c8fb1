"""Intervals of means over samples: a bootstrap over prompts, of differences where prompts and seeds are shared.

Samples of one prompt resemble each other, so prompts are what is resampled; a resampled prompt brings its seeds along
(Davison & Hinkley 1997, section 3.8: resampling within clusters too would count their variation twice). Where a setting
was trained several times, the variance between its trainings is added.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy import stats

from tasks.manifests.evaluation import MIN_CLUSTERS, Estimate

NUM_RESAMPLES = 9999
LEVEL = 0.95
MIN_FEW = 3
Values = Mapping[str, Mapping[int, float]]
"""By prompt, then by seed."""


def estimate_mean(clusters: Iterable[Sequence[float]]) -> Estimate:
    """Return the mean of all values with its 95 % interval; a cluster's values depend on each other.

    Percentile bootstrap, expanded for few clusters: the normal quantile is replaced by Student's, times
    sqrt(n / (n - 1)) (Hesterberg 2015, arXiv 1411.5279, section 4.3). Fixed seed: equal values have equal intervals.
    """
    rows = [np.asarray(cluster, float) for cluster in clusters if len(cluster)]
    sums, sizes = np.array([row.sum() for row in rows]), np.array([len(row) for row in rows])
    num = len(rows)
    mean = float(sums.sum() / sizes.sum())
    # Equal values tell nothing of how much others would vary: no copies among 12 samples are no proof of none.
    if num < MIN_CLUSTERS or np.ptp(np.concatenate(rows)) == 0:
        return Estimate(mean=mean, num=num)
    quantile = math.sqrt(num / (num - 1)) * stats.t.ppf((1 + LEVEL) / 2, num - 1)

    def mean_of(index: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(sums[index].sum(axis) / sizes[index].sum(axis))

    found = stats.bootstrap(
        (np.arange(num),),
        mean_of,
        n_resamples=NUM_RESAMPLES,
        vectorized=True,
        confidence_level=float(1 - 2 * stats.norm.sf(quantile)),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(mean=mean, low=float(found.low), high=float(found.high), num=num)


def estimate_samples(values: Values) -> Estimate:
    """Return the mean over prompts and seeds; the seeds of a single prompt are independent of each other."""
    if len(values) == 1:
        return estimate_mean([value] for by_seed in values.values() for value in by_seed.values())
    return estimate_mean(list(by_seed.values()) for by_seed in values.values())


def estimate_few(values: Sequence[float]) -> Estimate:
    """Return the mean of at least one value with its interval by Student's t, from three values on.

    A bootstrap of so few values covers too rarely. Two have one degree of freedom, and an interval of no use.
    """
    mean, num = fmean(values), len(values)
    if num < MIN_FEW or np.ptp(values) == 0:
        return Estimate(mean=mean, num=num)
    half = float(stats.t.ppf((1 + LEVEL) / 2, num - 1) * np.std(values, ddof=1)) / math.sqrt(num)
    return Estimate(mean=mean, low=mean - half, high=mean + half, num=num)


def subtract(second: Values, first: Values) -> dict[str, dict[int, float]]:
    """Return second less first, for the prompts and seeds that both have."""
    paired = {
        prompt: {seed: value - first[prompt][seed] for seed, value in by_seed.items() if seed in first[prompt]}
        for prompt, by_seed in second.items()
        if prompt in first
    }
    return {prompt: by_seed for prompt, by_seed in paired.items() if by_seed}


def list_independent(values: Values) -> list[float]:
    """Return the means of prompts; of a single prompt its seeds, which are independent of each other."""
    rows = [list(by_seed.values()) for by_seed in values.values() if by_seed]
    return rows[0] if len(rows) == 1 else [float(np.mean(row)) for row in rows]


def estimate_unpaired(second: Values, first: Values) -> Estimate:
    """Return the difference of two means over different prompts or seeds, by Welch's interval."""
    means = [np.array(list_independent(values)) for values in (second, first)]
    totals = [np.mean([v for by_seed in values.values() for v in by_seed.values()]) for values in (second, first)]
    difference, num = float(totals[0] - totals[1]), min(len(row) for row in means)
    errors = [float(row.var(ddof=1) / len(row)) if len(row) > 1 else 0.0 for row in means]
    if num < MIN_CLUSTERS or sum(errors) == 0:
        return Estimate(mean=difference, num=num)
    freedom = sum(errors) ** 2 / sum(e**2 / (len(row) - 1) for e, row in zip(errors, means, strict=True))
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(sum(errors))
    return Estimate(mean=difference, low=difference - half, high=difference + half, num=num)


@dataclass(frozen=True)
class Pooled:
    """Values of a setting over its trainings, or of the difference of two settings."""

    values: Values
    """Means over the trainings."""
    models: tuple[tuple[Values, ...], ...]
    """By setting: the values of each of its trainings, of the prompts and seeds above at least."""

    @property
    def trainings(self) -> tuple[tuple[float, ...], ...]:
        """By setting: the mean of each training, over the prompts and seeds that the values are of.

        Their variance is that of training seeds; of one training there is none.
        """
        cells = [(prompt, seed) for prompt, row in self.values.items() for seed in row]
        return tuple(
            tuple(fmean(model[prompt][seed] for prompt, seed in cells) for model in own) if cells else ()
            for own in self.models
        )


def pool_trainings(models: Sequence[Values]) -> Pooled:
    """Return the means over trainings of the prompts and sampling seeds that all of them have."""
    first, *others = models
    values: dict[str, dict[int, float]] = {}
    for prompt, by_seed in first.items():
        shared = [seed for seed in by_seed if all(seed in other.get(prompt, {}) for other in others)]
        if shared:
            values[prompt] = {seed: fmean(model[prompt][seed] for model in models) for seed in shared}
    return Pooled(values, (tuple(models),))


def subtract_pooled(second: Pooled, first: Pooled) -> Pooled:
    """Return second less first, for the prompts and seeds that both have."""
    return Pooled(subtract(second.values, first.values), second.models + first.models)


def estimate_pooled(pooled: Pooled) -> Estimate:
    """Return the mean over prompts and trainings, with an interval for other prompts like them and other trainings."""
    return add_training_variance(estimate_samples(pooled.values), pooled.trainings)


def add_training_variance(found: Estimate, trainings: Sequence[Sequence[float]]) -> Estimate:
    """Widen an interval over prompts by that over training seeds.

    Every training is measured on the same prompts, so the two are crossed, not nested, and neither contains the other's
    variance: their half widths are added as squares (MOVER, Zou & Donner 2008). Student's t over the few training
    seeds, since a bootstrap that resamples two or three of them covers far too rarely; of two settings by
    Welch-Satterthwaite, since their trainings share nothing that would pair them. Unlike one t over both variances, it
    still covers 95 % with two seeds, whose variance is often underestimated.
    """
    rows = [np.array(row) for row in trainings if len(row) > 1]
    errors = [float(row.var(ddof=1) / len(row)) for row in rows]
    if found.num < MIN_CLUSTERS or not any(errors):
        return found
    freedom = sum(errors) ** 2 / sum(e**2 / (len(row) - 1) for e, row in zip(errors, rows, strict=True))
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(sum(errors))
    low, high = (0.0 if end is None else abs(end - found.mean) for end in (found.low, found.high))
    ends = {"low": found.mean - math.hypot(low, half), "high": found.mean + math.hypot(high, half)}
    return found.model_copy(update=ends)
