"""Metrics on embeddings whose answer is known."""

import math
from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from tasks.encoders.config import EncoderConfig
from tasks.encoders.folders import find_lpips
from tasks.encoders.lpips import Lpips, load_lpips, make_alexnet
from tasks.evaluation.metrics import (
    Features,
    mean_pairwise_similarity,
    mean_similarity,
    measure_all,
    measure_div,
    measure_drift,
)
from tests.support.config import make_config


def at(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def described(*degrees: float, texts: tuple[float, ...] = ()) -> Features:
    return Features(at(*degrees), at(*degrees), at(*(texts or degrees)))


def test_similarity_is_the_mean_over_all_pairs() -> None:
    assert mean_similarity(at(0, 90), at(0)) == pytest.approx(0.5)


def test_pairwise_similarity_excludes_self_pairs() -> None:
    assert mean_pairwise_similarity(at(0, 90)) == pytest.approx(0.0, abs=1e-6)
    assert mean_pairwise_similarity(at(0, 0, 0)) == pytest.approx(1.0)
    assert mean_pairwise_similarity(at(30)) == 1.0


def test_a_class_that_collapses_onto_the_subject_raises_pres_and_lowers_dino_div() -> None:
    photos = described(0, 0)
    before, after = measure_drift(described(30, 90), photos), measure_drift(described(1, 2), photos)
    assert after.pres > before.pres
    assert after.dino_div < before.dino_div


def test_closer_samples_score_higher_and_the_ceiling_compares_the_photos() -> None:
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


def test_div_is_the_mean_over_prompts_of_the_mean_distance_of_their_samples() -> None:
    pictures = [[Image.new("RGB", (64, 64), (level, 0, 0)) for level in levels] for levels in ((0, 10), (0, 30), (5,))]

    def distance(row: Sequence[Image.Image]) -> float:
        return float(row[1].getpixel((0, 0))[0] - row[0].getpixel((0, 0))[0])  # type: ignore[index]

    assert measure_div(pictures, distance) == pytest.approx(20)


def test_lpips_is_zero_for_equal_images_and_grows_with_the_difference() -> None:
    torch.manual_seed(0)
    trunk = {f"features.{key}": value for key, value in make_alexnet().state_dict().items()}
    widths = (64, 192, 384, 256, 256)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    lpips = Lpips(trunk, linear)
    first = torch.rand(1, 3, 64, 64) * 2 - 1
    other = torch.rand(1, 3, 64, 64) * 2 - 1
    assert float(lpips(first, first)) == 0
    near, far = (float(lpips(first, torch.lerp(first, other, share))) for share in (0.2, 1.0))
    assert 0 < near < far
    assert torch.equal(lpips(first, other), lpips(other, first))


@pytest.mark.skipif(
    find_lpips(make_config(EncoderConfig, clip="mini", dino="mini")) is None, reason="needs lpips and AlexNet"
)
def test_lpips_matches_the_lpips_package() -> None:
    package = pytest.importorskip("lpips")
    files = find_lpips(make_config(EncoderConfig, clip="mini", dino="mini"))
    assert files is not None
    first, other = (torch.rand(1, 3, 64, 64) * 2 - 1 for _ in range(2))
    theirs = package.LPIPS(net="alex", verbose=False)(first, other)
    # Eight float32 layers in the same order.
    torch.testing.assert_close(
        load_lpips(files, torch.device("cpu"))(first, other), theirs.flatten(), rtol=1e-4, atol=1e-6
    )
