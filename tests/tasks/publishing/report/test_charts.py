"""Charts of values that no axis holds: they are drawn without them, or not at all."""

import itertools
import re

import pytest

from tasks.manifests.evaluation import Estimate
from tasks.metrics import METRICS
from tasks.publishing.report.charts import PlanePoint, Series, draw_lines, draw_plane, draw_values
from tasks.publishing.report.tables import MetricRow

NAN, INF = float("nan"), float("inf")
EXTREMES = (0.0, 1e17, -1e17, 1e300, 1e308, -1e308, 5e-324, 1e-310, NAN, INF, -INF)


def check_svg(chart: str) -> None:
    assert not re.search(r"\b(?:nan|inf)\b", chart)


@pytest.mark.parametrize("value", EXTREMES)
def test_equal_values_of_any_size_have_an_axis_or_no_chart(value: float) -> None:
    same = Estimate(mean=value, num=9)
    row = MetricRow("mine", METRICS["dino"], same, same, None, same, None)
    check_svg(draw_values((("base", same), ("tuned", same)), same, low=row.limits[0], high=row.limits[1]))
    check_svg(draw_plane([PlanePoint("tuned", same, same, "tuned")], ("x", "y")))
    check_svg(draw_lines([Series("loss", [(float(step), value) for step in range(5)], "tuned")], ("step", "loss")))
    check_svg(draw_lines([Series("loss", [(1.0, value)], "tuned", has_dots=True)], ("step", "loss")))


@pytest.mark.parametrize("other", EXTREMES)
@pytest.mark.parametrize("value", EXTREMES)
def test_values_of_any_two_sizes_are_drawn_together(value: float, other: float) -> None:
    one, two = Estimate(mean=value, low=value, high=other, num=9), Estimate(mean=other, num=9)
    row = MetricRow("mine", METRICS["dino"], one, two, None, one, None)
    check_svg(draw_values((("base", one), ("tuned", two)), one, low=row.limits[0], high=row.limits[1]))
    check_svg(draw_plane([PlanePoint("a", one, two, "base"), PlanePoint("b", two, one, "tuned")], ("x", "y")))
    check_svg(draw_lines([Series("loss", [(0.0, value), (1.0, other)], "tuned")], ("step", "loss")))


def test_points_that_are_not_finite_are_left_out_of_a_curve() -> None:
    chart = draw_lines([Series("loss", [(0.0, 1.0), (1.0, NAN), (2.0, 3.0)], "tuned")], ("step", "loss"))
    [points] = re.findall(r'points="([^"]*)"', chart)
    assert len(points.split()) == 2


def test_a_plane_without_points_is_empty() -> None:
    assert draw_plane([], ("x", "y")) == ""


@pytest.mark.parametrize(
    ("low", "high", "least"),
    [(0.0, 1.0, 3), (0.31, 0.36, 2), (-0.02, 0.02, 2), (120.0, 480.0, 2), (0.98765, 0.98771, 1), (-3e7, 4e7, 1)],
)
def test_a_small_chart_has_an_axis_whose_labels_do_not_touch(low: float, high: float, least: int) -> None:
    values = (("base", Estimate(mean=low, num=9)), ("tuned", Estimate(mean=high, num=9)))
    chart = draw_values(values, None, low=low, high=high)
    check_svg(chart)
    height = float(re.search(r'viewBox="0 0 220 (\d+)"', chart)[1])  # type: ignore[index]
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="middle">([^<]+)</text>', chart)
    assert len(labels) >= least
    assert chart.count('class="axis"') == 1
    assert all(float(y) < height for _, y, _ in labels)
    for x, _, label in labels:  # where the axis says
        value = float(label.replace("\N{MINUS SIGN}", "-"))
        assert float(x) == pytest.approx(18 + (value - low) / (high - low) * 184, abs=0.06)
    for (one, _, first), (two, _, second) in itertools.pairwise(labels):
        assert float(two) - float(one) > 7 * (len(first) + len(second)) / 2
