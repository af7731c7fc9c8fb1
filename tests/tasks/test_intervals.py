"""Intervals cover the true mean as often as they say, and pairing narrows them."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from tasks import intervals
from tasks.intervals import (
    Pooled,
    Values,
    estimate_mean,
    estimate_pooled,
    estimate_samples,
    estimate_unpaired,
    pool_trainings,
    subtract,
    subtract_pooled,
)
from tasks.manifests.evaluation import Estimate

NUM_STUDIES = 400


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coverage needs hundreds of intervals; 1999 resamples place their ends well enough."""
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 1999)


def measure_coverage(draw: Callable[[np.random.Generator], Estimate], truth: float) -> float:
    rng = np.random.default_rng(5)
    found = [draw(rng) for _ in range(NUM_STUDIES)]
    return float(np.mean([each.low <= truth <= each.high for each in found]))  # type: ignore[operator]


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("num_prompts", [6, 25])
@pytest.mark.parametrize("between", [0.0, 0.1])
def test_an_interval_covers_the_true_mean_nineteen_times_in_twenty(num_prompts: int, between: float) -> None:
    def draw(rng: np.random.Generator) -> Estimate:
        prompts = rng.normal(0.6, between, (num_prompts, 1))
        return estimate_mean((prompts + rng.normal(0, 0.1, (num_prompts, 4))).tolist())

    # The standard error of a share of 0.95 in 400 studies is 0.011: three of them, and a hundredth for the bootstrap's
    # own error with six prompts.
    assert measure_coverage(draw, 0.6) == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / NUM_STUDIES) + 0.01)


@pytest.mark.usefixtures("few_resamples")
def test_an_interval_that_takes_samples_of_a_prompt_for_independent_covers_too_rarely() -> None:
    def draw(rng: np.random.Generator) -> Estimate:
        values = rng.normal(0.6, 0.1, (6, 1)) + rng.normal(0, 0.02, (6, 4))
        return estimate_mean([[value] for value in values.ravel()])

    assert measure_coverage(draw, 0.6) < 0.8


def test_pairing_by_prompt_and_seed_narrows_the_interval_of_a_difference() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.normal(0.5, 0.2, (8, 1)) + rng.normal(0, 0.05, (8, 2))
    base = {f"p{i}": dict(enumerate(row)) for i, row in enumerate(prompts.tolist())}
    tuned = {
        name: {seed: value + 0.05 + rng.normal(0, 0.01) for seed, value in row.items()} for name, row in base.items()
    }
    paired, unpaired = estimate_samples(subtract(tuned, base)), estimate_unpaired(tuned, base)
    assert paired.mean == pytest.approx(unpaired.mean)
    assert paired.is_decided
    assert not unpaired.is_decided


def test_only_prompts_and_seeds_that_both_have_are_paired() -> None:
    first, second = {"a": {1: 0.1, 2: 0.2}, "b": {1: 0.5}}, {"a": {2: 0.5, 3: 0.9}, "c": {1: 1.0}}
    assert subtract(second, first) == {"a": {2: pytest.approx(0.3)}}


def test_too_few_prompts_have_a_mean_and_no_interval() -> None:
    few = estimate_mean([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]])
    assert (few.mean, few.low, few.high, few.num) == (pytest.approx(0.45), None, None, 4)
    assert estimate_mean([[0.1], [0.3], [0.5], [0.7], [0.9]]).low is not None


def test_seeds_of_a_single_prompt_are_independent_of_each_other() -> None:
    assert estimate_samples({"a": {seed: seed / 10 for seed in range(6)}}).num == 6


def test_values_that_do_not_vary_have_no_interval() -> None:
    assert estimate_mean([[1.0]] * 6) == Estimate(mean=1.0, num=6)
    assert estimate_unpaired({str(i): {0: 1.0} for i in range(6)}, {str(i): {0: 0.5} for i in range(6)}).low is None


def test_the_interval_of_the_same_values_repeats() -> None:
    values = [[float(i)] for i in range(7)]
    assert estimate_mean(values) == estimate_mean(values)


def test_unpaired_seeds_of_a_single_prompt_are_independent_as_paired_ones_are() -> None:
    rng = np.random.default_rng(0)
    first = {"": dict(enumerate(rng.normal(0.3, 0.05, 20)))}
    second = {"": dict(enumerate(rng.normal(0.5, 0.05, 20)))}
    found = estimate_unpaired(second, first)
    assert found.num == 20
    assert found.low is not None
    assert 0.1 < found.low < found.mean < 0.3


def draw_trainings(
    rng: np.random.Generator, num: int, prompts: np.ndarray, *, between_seeds: float, mean: float = 0.6
) -> list[Values]:
    """Return as many trainings of one setting: what a seed adds is on all prompts, what a prompt adds on all seeds."""
    table = mean + rng.normal(0, between_seeds, (num, 1)) + prompts + rng.normal(0, 0.005, (num, len(prompts)))
    return [{str(prompt): {0: float(value)} for prompt, value in enumerate(row)} for row in table]


def pool_drawn(rng: np.random.Generator, num: int, *, between_seeds: float, between_prompts: float = 0.01) -> Pooled:
    prompts = rng.normal(0, between_prompts, 8)
    return pool_trainings(draw_trainings(rng, num, prompts, between_seeds=between_seeds))


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("between_seeds", [0.1, 0.01])
def test_an_interval_over_trainings_covers_other_trainings_too(num_seeds: int, between_seeds: float) -> None:
    def draw(rng: np.random.Generator) -> Estimate:
        return estimate_pooled(pool_drawn(rng, num_seeds, between_seeds=between_seeds))

    assert measure_coverage(draw, 0.6) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / NUM_STUDIES)


@pytest.mark.usefixtures("few_resamples")
def test_an_interval_over_prompts_alone_misses_other_trainings() -> None:
    def draw(rng: np.random.Generator) -> Estimate:
        return estimate_samples(pool_drawn(rng, 3, between_seeds=0.1).values)

    assert measure_coverage(draw, 0.6) < 0.3


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("numbers", [(3, 3), (2, 4)])
def test_a_difference_of_settings_covers_other_trainings_of_both(numbers: tuple[int, int]) -> None:
    def draw(rng: np.random.Generator) -> Estimate:
        prompts = rng.normal(0, 0.1, 8)  # of both: what pairing removes
        models = (
            pool_trainings(draw_trainings(rng, num, prompts, between_seeds=0.05, mean=mean))
            for num, mean in zip(numbers, (0.5, 0.6), strict=True)
        )
        return estimate_pooled(subtract_pooled(*reversed(list(models))))

    assert measure_coverage(draw, 0.1) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / NUM_STUDIES)


def test_one_training_has_the_interval_over_prompts_and_equal_ones_add_nothing() -> None:
    rng = np.random.default_rng(0)
    [one] = draw_trainings(rng, 1, rng.normal(0, 0.1, 8), between_seeds=0)
    assert estimate_pooled(pool_trainings([one])) == estimate_samples(one)
    twice = estimate_pooled(pool_trainings([one, one]))  # the base model beside two trainings
    assert (twice.low, twice.high) == pytest.approx((estimate_samples(one).low, estimate_samples(one).high))


def test_trainings_that_differ_on_every_prompt_alike_have_an_interval() -> None:
    trainings = [{str(prompt): {0: value} for prompt in range(8)} for value in (0.25, 0.75)]
    found = estimate_pooled(pool_trainings(trainings))
    # Student's t with one degree of freedom, 12.706, times the standard error 0.25.
    assert (found.low, found.mean, found.high) == pytest.approx((0.5 - 3.1766, 0.5, 0.5 + 3.1766), abs=1e-3)


def test_samples_that_one_training_lacks_are_left_out_of_all() -> None:
    pooled = pool_trainings([{"a": {1: 0.1, 2: 0.9}, "b": {1: 0.5}}, {"a": {1: 0.3}}])
    assert pooled.values == {"a": {1: pytest.approx(0.2)}}
    assert pooled.trainings == (pytest.approx((0.1, 0.3)),)


def test_the_variance_of_trainings_is_that_on_the_prompts_that_both_settings_have() -> None:
    shared = {str(prompt): {0: 0.5 + prompt / 100} for prompt in range(6)}
    own = [{**shared, **{f"own {prompt}": {0: value} for prompt in range(20)}} for value in (0.1, 0.9)]
    difference = subtract_pooled(pool_trainings(own), pool_trainings([shared, shared]))
    assert difference.values.keys() == shared.keys()
    first, second = difference.trainings
    assert first[0] == pytest.approx(first[1])  # their means over all prompts differ by 0.6
    assert first == pytest.approx(second)
