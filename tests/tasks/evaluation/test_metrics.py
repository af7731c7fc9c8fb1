"""Metrics on descriptors whose answer is known."""

import math

import pytest
import torch

from tasks.evaluation.metrics import (
    Described,
    mean_similarity,
    mean_similarity_within,
    measure_all,
    measure_drift,
)


def at(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def described(*degrees: float, texts: tuple[float, ...] = ()) -> Described:
    return Described(at(*degrees), at(*degrees), at(*(texts or degrees)))


def test_similarity_is_the_mean_over_all_pairs() -> None:
    assert mean_similarity(at(0, 90), at(0)) == pytest.approx(0.5)


def test_similarity_within_leaves_out_a_row_with_itself() -> None:
    assert mean_similarity_within(at(0, 90)) == pytest.approx(0.0, abs=1e-6)
    assert mean_similarity_within(at(0, 0, 0)) == pytest.approx(1.0)
    assert mean_similarity_within(at(30)) == 1.0


def test_a_class_that_collapses_onto_the_subject_raises_pres_and_lowers_div() -> None:
    photos = described(0, 0)
    before, after = measure_drift(described(30, 90), photos), measure_drift(described(1, 2), photos)
    assert after.pres > before.pres
    assert after.div < before.div


def test_nearer_samples_score_higher_and_the_ceiling_is_the_photos_own() -> None:
    photos = described(0, 10)
    measured = measure_all(
        photos,
        {"base": described(80, 90, texts=(80, 0)), "tuned": described(0, 10)},
        {"base": described(80, 90), "tuned": described(50, 60)},
    )
    assert measured.metrics["tuned"].dino > measured.metrics["base"].dino
    assert measured.ceiling.dino == pytest.approx(math.cos(math.radians(10)), abs=1e-5)
    assert measured.metrics["base"].clip_t == pytest.approx(0.5, abs=1e-5)
    assert measured.metrics["tuned"].clip_t == pytest.approx(1.0)
