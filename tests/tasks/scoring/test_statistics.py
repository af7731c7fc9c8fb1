"""Figures of agreement, against published examples and other implementations."""

import numpy as np
import pytest

from tasks.scoring.statistics import (
    compute_alpha,
    compute_kappa,
    compute_spearman,
    compute_strengths,
)


def test_alpha_matches_the_published_example_of_krippendorff() -> None:
    # Krippendorff 2011, section C: four observers, twelve units, levels 1 to 5; ordinal alpha 0.815.
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [[row[i] - 1 for row in observers if row[i] is not None] for i in range(12)]  # type: ignore[operator]
    assert compute_alpha(units) == pytest.approx(0.815, abs=0.0005)


def test_alpha_is_one_for_agreement_near_zero_for_chance_and_none_if_undefined() -> None:
    assert compute_alpha([[0, 0], [2, 2], [4, 4]]) == pytest.approx(1)
    chance = np.random.default_rng(0).integers(5, size=(2000, 3)).tolist()
    assert abs(compute_alpha(chance) or 1) < 0.05
    assert compute_alpha([[3, 3], [3, 3]]) is None
    assert compute_alpha([[0, 4]]) is None
    assert compute_alpha([]) is None


def test_kappa_matches_scikit_learn() -> None:
    from sklearn.metrics import cohen_kappa_score

    random = np.random.default_rng(1)
    first = random.integers(5, size=60).tolist()
    second = [min(4, max(0, grade + int(random.integers(-1, 2)))) for grade in first]
    expected = cohen_kappa_score(first, second, weights="quadratic", labels=range(5))
    assert compute_kappa(first, second) == pytest.approx(expected)
    assert compute_kappa([2, 2], [2, 2]) is None


def test_spearman_is_none_for_constant_input() -> None:
    assert compute_spearman([1, 2, 3], [10, 20, 25]) == pytest.approx(1)
    assert compute_spearman([1, 1, 1], [1, 2, 3]) is None


def test_strengths_follow_wins_and_stay_finite() -> None:
    strengths = compute_strengths(["a", "b", "c"], {("a", "b"): 8, ("b", "a"): 2, ("b", "c"): 8, ("c", "b"): 2})
    assert strengths["a"] > strengths["b"] > strengths["c"] > 0
    assert sum(strengths.values()) == pytest.approx(1)
    # a against b and b against c went alike, so both odds are the same: 8.5 to 2.5.
    assert strengths["a"] / strengths["b"] == pytest.approx(8.5 / 2.5, rel=1e-3)
    assert compute_strengths(["a", "b"], {("a", "b"): 5})["a"] == pytest.approx(5.5 / 6)
