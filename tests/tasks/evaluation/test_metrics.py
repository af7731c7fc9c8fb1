"""Metrics on embeddings whose answer is known."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from tasks.encoders.config import EncoderConfig
from tasks.encoders.folders import find_lpips
from tasks.encoders.lpips import Lpips, load_lpips, make_alexnet, pairwise_distances
from tasks.evaluation.measurement import Measured, measure_all
from tasks.evaluation.metrics import (
    Features,
    estimate_similarity,
    find_functions,
    measure_ceiling,
    measure_clip_t,
    measure_copies,
    measure_dino,
    measure_dino_spread,
    measure_div,
    measure_nearest,
    measure_sharpness,
    spread,
)
from tasks.intervals import estimate_few
from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Estimate, Sample, SampleKind, Side
from tasks.metrics import METRICS
from tests.support.config import make_config
from tests.support.tiny import draw_photo


def at(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def described(*degrees: float, texts: tuple[float, ...] = ()) -> Features:
    return Features(at(*degrees), at(*degrees), at(*(texts or degrees)))


def drawn(*degrees: float) -> Features:
    return Features(at(*degrees), at(*degrees), at(*degrees), tuple(draw_photo(i) for i in range(len(degrees))))


def make_sample(side: Side, kind: SampleKind, number: int, *, prompt: int = 0) -> Sample:
    template = "" if kind == "class" else f"{{subject}} {prompt}"
    return Sample(
        image=ObjectRef(key=f"{side}/{kind}-{prompt}-{number}", sha256="", size_bytes=0), side=side, kind=kind,
        prompt=template, class_prompt="", seed=number, template=template,
        prompt_kind="" if kind == "class" else ("scene", "style")[prompt % 2],
    )  # fmt: skip


def measure(base: Sequence[float], tuned: Sequence[float], classes: Sequence[float] = (10, 60, 90)) -> Measured:
    """Measure samples at angles, two of each prompt, against photos at 0, 10 and 20 degrees."""
    samples = [
        make_sample(side, "subject", number % 2, prompt=number // 2)
        for side, angles in (("base", base), ("tuned", tuned))
        for number in range(len(angles))
    ]
    samples += [make_sample(side, "class", number) for side in ("base", "tuned") for number in range(len(classes))]
    angles = [*base, *tuned, *classes, *(angle / 2 for angle in classes)]
    return measure_all(samples, drawn(*angles), drawn(0, 10, 20))


def test_every_metric_of_the_registry_has_a_function_with_values_in_its_range() -> None:
    functions = find_functions()
    assert set(functions) == set(METRICS)
    samples, photos = drawn(5, 40, 170), drawn(0, 30)
    for name, metric in METRICS.items():
        values = functions[name](samples, photos)
        if values is None:  # LPIPS without weights
            assert name == "div"
            continue
        low, high = metric.range
        assert len(values) == 3
        assert all(low - 1e-6 <= float(value) for value in values) or metric.level != "sample", name
        assert low - 1e-6 <= float(np.mean([float(value) for value in values])) <= high + 1e-6, name


def test_similarity_is_the_mean_over_all_pairs() -> None:
    assert float(measure_dino(described(0, 90), described(0)).mean()) == pytest.approx(0.5)


def test_pairwise_similarity_excludes_self_pairs() -> None:
    assert estimate_similarity(at(0, 90)).mean == pytest.approx(0.0, abs=1e-6)
    assert estimate_similarity(at(0, 0, 0)).mean == pytest.approx(1.0)
    assert estimate_similarity(at(30)).mean == 1.0


def test_clip_t_compares_each_sample_with_its_own_prompt() -> None:
    assert measure_clip_t(described(0, 90, texts=(0, 0)), described(0)).tolist() == pytest.approx([1, 0], abs=1e-6)


def test_pseudo_values_have_the_mean_of_all_pairs_and_the_spread_of_the_jackknife() -> None:
    distances = torch.tensor([[0.0, 0.2, 0.5, 0.6], [0.2, 0.0, 0.4, 0.9], [0.5, 0.4, 0.0, 0.1], [0.6, 0.9, 0.1, 0.0]])

    def mean_of(rows: list[int]) -> float:
        return float(np.mean([distances[i, j] for i in rows for j in rows if i != j]))

    everything = [0, 1, 2, 3]
    expected = [4 * mean_of(everything) - 3 * mean_of([j for j in everything if j != i]) for i in everything]
    assert spread(distances).tolist() == pytest.approx(expected, rel=1e-5)
    assert float(spread(distances).mean()) == pytest.approx(mean_of(everything))
    assert spread(distances[:2, :2]).tolist() == pytest.approx([0.2, 0.2])


def test_a_class_that_collapses_onto_the_subject_raises_pres_and_lowers_dino_div() -> None:
    measured = measure([50, 60], [5, 6], classes=(40, 80, 120))  # the tuned ones at half the angles
    assert measured.drift["tuned"].pres > measured.drift["base"].pres
    assert measured.drift["tuned"].dino_div < measured.drift["base"].dino_div


def test_closer_samples_score_higher_and_the_ceiling_compares_the_photos() -> None:
    measured = measure([80, 90, 85, 70], [0, 10, 5, 3])
    assert measured.metrics["tuned"].dino > measured.metrics["base"].dino
    cosines = [math.cos(math.radians(angle)) for angle in (10, 10, 20)]
    assert measured.ceiling.dino == pytest.approx(sum(cosines) / 3, abs=1e-5)
    assert measured.metrics["tuned"].clip_t == pytest.approx(1.0)


def test_the_ceiling_has_intervals_over_photos_and_the_nearest_pair_has_none() -> None:
    measured = measure([80, 90, 85, 70], [0, 10, 5, 3])
    found = {name: by_side["ceiling"] for name, by_side in measured.estimates.items() if "ceiling" in by_side}
    assert {name: each.mean for name, each in found.items()} == pytest.approx(dict(measured.ceiling))
    photos = at(0, 10, 20)
    values = 1 - spread(1 - photos @ photos.T)
    # Student's t with two degrees of freedom, 4.303, times the standard error of the photos' pseudo-values.
    half = 4.3027 * float(values.std()) / math.sqrt(3)
    assert found["dino"].num == 3
    mean = float(values.mean())
    assert (found["dino"].low, found["dino"].high) == pytest.approx((mean - half, min(1, mean + half)), 1e-4)
    assert found["nearest"].low is None
    assert measured.kinds["scene"]["dino"].keys() == {"base", "tuned", "gain"}


def test_no_interval_of_the_ceiling_leaves_the_range_of_its_metric() -> None:
    odd = measure_ceiling(described(0, 5, 80))
    # Student's t of three photos, one of them unlike the others, is wider.
    assert (odd["dino"].low, odd["dino"].high) == (-1, 1)


def test_two_photos_have_a_ceiling_without_an_interval() -> None:
    assert estimate_similarity(at(0, 60)).mean == pytest.approx(0.5)
    assert estimate_similarity(at(0, 60)).low is None
    assert estimate_similarity(at(0)) == Estimate(mean=1.0, num=1)


def draw_embeddings(rng: np.random.Generator, num: int) -> torch.Tensor:
    """Return photos of a subject: a direction that all share, and as much that each has alone."""
    rows = np.eye(64)[0] + rng.normal(0, 1 / 8, (num, 64))
    return torch.tensor(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.mark.parametrize("num", [3, 5])
def test_intervals_of_the_ceiling_leave_out_photos_as_pairs_are_not_independent(num: int) -> None:
    rng = np.random.default_rng(0)
    truth = estimate_similarity(draw_embeddings(rng, 2000)).mean
    covers = {"photos": 0, "pairs": 0}
    for _ in range(400):
        rows = draw_embeddings(rng, num)
        pairs = (rows @ rows.T)[tuple(torch.triu_indices(num, num, 1))].tolist()
        for name, found in (("photos", estimate_similarity(rows)), ("pairs", estimate_few(pairs))):
            assert found.low is not None and found.high is not None
            covers[name] += found.low <= truth <= found.high
    assert covers["photos"] >= 0.93 * 400
    assert covers["pairs"] < 0.92 * 400


def test_a_near_duplicate_of_a_photo_counts_as_a_copy_and_a_new_view_does_not() -> None:
    photos = described(0, 10, 30)
    assert measure_nearest(described(0, 20), photos).tolist() == pytest.approx([1, math.cos(math.radians(10))])
    copies = measure_copies(described(0.1, 9.5, 20, 45), photos)
    assert copies is not None
    assert copies.tolist() == [1, 1, 0, 0]
    assert measure_copies(described(0), described(0)) is None  # a single photo has no ceiling


def test_copies_among_the_samples_are_counted_and_named() -> None:
    measured = measure([70, 80, 75, 60], [0.5, 10.5, 45, 60])
    assert measured.estimates["copies"]["tuned"].mean == 0.5
    assert measured.estimates["copies"]["base"].mean == 0
    named = [key for key, row in measured.sample_metrics.items() if row.model_dump()["copies"]]
    assert named == ["tuned/subject-0-0", "tuned/subject-0-1"]


def test_a_blurred_sample_is_less_sharp() -> None:
    picture = draw_photo(0)
    features = Features(at(0, 0), at(0, 0), at(0, 0), (picture, picture.filter(ImageFilter.GaussianBlur(3))))
    sharp, blurred = measure_sharpness(features, features)
    assert blurred < sharp / 4


def test_diversity_is_measured_among_samples_of_one_prompt() -> None:
    measured = measure([0, 90, 40, 40], [0, 90, 0, 90])
    # One prompt of the base model has two equal samples.
    assert measured.estimates["dino_spread"]["base"].mean == pytest.approx(0.5, abs=1e-5)
    assert measured.estimates["dino_spread"]["tuned"].mean == pytest.approx(1.0, abs=1e-5)
    assert measure_dino_spread(described(0), described(0)) is None


def test_div_is_the_mean_distance_among_the_samples_of_a_prompt() -> None:
    def distances(pictures: Sequence[Image.Image]) -> torch.Tensor:
        levels = torch.tensor([float(picture.getpixel((0, 0))[0]) for picture in pictures])  # type: ignore[index]
        return (levels[:, None] - levels).abs()

    pictures = tuple(Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 10, 30))
    found = measure_div(Features(at(0, 0, 0), at(0, 0, 0), at(0, 0, 0), pictures, distances), described(0))
    assert found is not None
    assert float(found.mean()) == pytest.approx(20)
    assert measure_div(drawn(0, 1), described(0)) is None  # without LPIPS


def test_the_gain_is_paired_and_tables_are_given_by_prompt_and_by_kind() -> None:
    base = [60.0 + number for number in range(12)]
    measured = measure(base, [angle - 40 for angle in base])
    gain = measured.estimates["dino"]["gain"]
    assert gain.num == 6
    assert gain.is_decided
    assert gain.mean == pytest.approx(measured.metrics["tuned"].dino - measured.metrics["base"].dino, abs=1e-5)
    assert set(measured.kinds) == {"scene", "style"}
    assert measured.kinds["style"]["dino"]["tuned"].num == 3
    assert [row.template for row in measured.prompts] == [f"{{subject}} {number}" for number in range(6)]
    rows = [row.values["dino"]["tuned"].mean for row in measured.prompts]
    assert sum(rows) / 6 == pytest.approx(measured.metrics["tuned"].dino, abs=1e-5)
    assert "pres" not in measured.prompts[0].values


def test_metrics_of_each_class_sample_have_the_mean_of_the_class() -> None:
    measured = measure([50, 60], [5, 6])
    values = [row["pres"] for key, row in measured.class_metrics.items() if key.startswith("tuned")]
    assert len(values) == 3
    assert sum(values) / 3 == pytest.approx(measured.drift["tuned"].pres, abs=1e-5)


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
    found = pairwise_distances(lpips, [draw_photo(i, size=64) for i in range(3)])
    assert torch.equal(found, found.T)
    assert float(found.diagonal().abs().sum()) == 0
    assert float(found[0, 1]) > 0


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


def test_metrics_among_samples_of_a_prompt_are_left_out_where_a_side_has_single_ones() -> None:
    found = measure((0, 10, 20, 30), (5,))  # as a safety checker leaves them
    whole = measure((0, 10, 20, 30), (5, 15))
    among = {name for name, metric in METRICS.items() if metric.level == "prompt"} & set(
        whole.metrics["tuned"].model_dump()
    )
    assert among
    for side in ("base", "tuned"):
        names = set(found.metrics[side].model_dump())  # type: ignore[index]
        assert {"dino", "clip_i", "clip_t"} <= names
        assert not among & names
    assert found.estimates["dino"]["gain"].num == 1
