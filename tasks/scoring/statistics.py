"""Statistics of grades: agreement, rank correlation, intervals of proportions, Bradley-Terry strengths."""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
from scipy import stats

NUM_RESAMPLES = 2000


def compute_alpha(units: Sequence[Sequence[int]], *, num_levels: int = 5) -> float | None:
    """Return Krippendorff's alpha for ordinal grades 0..num_levels-1: 1 is perfect agreement, 0 is chance.

    `units` holds the repeated grades of each item (Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability"). None where fewer than two items were graded twice, or all grades are equal: expected
    disagreement is then zero.
    """
    # Coincidence matrix: every ordered pair of a unit's grades, weighted so that a unit counts by its size.
    counts = np.zeros((num_levels, num_levels))
    paired = [unit for unit in units if len(unit) > 1]
    for unit in paired:
        for first, second in permutations(unit, 2):
            counts[first, second] += 1 / (len(unit) - 1)
    totals = counts.sum(1)
    if len(paired) < 2 or (totals > 0).sum() < 2:
        return None
    # Squared ordinal distance: the grades between two levels, each end level counting half.
    between = np.zeros_like(counts)
    for low in range(num_levels):
        for high in range(low, num_levels):
            distance = totals[low : high + 1].sum() - (totals[low] + totals[high]) / 2
            between[low, high] = between[high, low] = distance**2
    # Pairs are drawn without replacement: no grade is paired with itself.
    expected = (np.outer(totals, totals) - np.diag(totals)) / (totals.sum() - 1)
    return float(1 - (counts * between).sum() / (expected * between).sum())


def compute_kappa(first: Sequence[int], second: Sequence[int], *, num_levels: int = 5) -> float | None:
    """Return Cohen's kappa with quadratic weights; None for fewer than 2 grades or a constant rater."""
    observed = np.zeros((num_levels, num_levels))
    for one, other in zip(first, second, strict=True):
        observed[one, other] += 1
    if len(first) < 2 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    observed /= observed.sum()
    expected = np.outer(observed.sum(1), observed.sum(0))
    levels = np.arange(num_levels)
    # Not normalized: the factor cancels in the ratio.
    weights = (levels[:, None] - levels[None]) ** 2
    return float(1 - (weights * observed).sum() / (weights * expected).sum())


def compute_spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None for fewer than 3 values or a constant side."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(stats.spearmanr(first, second).statistic)


def binomial_interval(wins: int, num: int) -> tuple[float, float]:
    """Return the exact 95 % interval (Clopper & Pearson 1934) of a proportion of `num` >= 1 independent trials."""
    found = stats.binomtest(wins, num).proportion_ci(0.95, method="exact")
    return float(found.low), float(found.high)


def compute_strengths(candidates: Sequence[str], wins: dict[tuple[str, str], float]) -> dict[str, float]:
    """Return Bradley-Terry strengths that sum to one, from wins by (winner, loser); a tie is half a win each.

    Half a win either way is added to every compared pair as a prior: an undefeated candidate would else have infinite
    strength. Fitted by the MM algorithm (Hunter 2004, "MM algorithms for generalized Bradley-Terry models").
    """
    index = {candidate: i for i, candidate in enumerate(candidates)}
    won = np.zeros((len(candidates), len(candidates)))
    for (winner, loser), count in wins.items():
        won[index[winner], index[loser]] += count
    met = (won + won.T) > 0
    won += 0.5 * met
    games = won + won.T
    strengths = np.ones(len(candidates)) / len(candidates)
    for _ in range(1000):
        # p_i <- wins_i / sum_j games_ij / (p_i + p_j), then normalize: the scale of p is arbitrary.
        shared = games / (strengths[:, None] + strengths[None])
        # Without any comparison a strength stays; the floor is for `np.where`, which evaluates both branches.
        updated = np.where(shared.sum(1) > 0, won.sum(1) / np.maximum(shared.sum(1), 1e-12), strengths)
        updated /= updated.sum()
        if np.abs(updated - strengths).max() < 1e-10:
            break
        strengths = updated
    return dict(zip(candidates, updated.tolist(), strict=True))
