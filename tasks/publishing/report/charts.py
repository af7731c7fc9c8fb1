"""Charts as inline SVG, with axes, ticks and intervals; colours are those of the page, light or dark."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from tasks.manifests.evaluation import Estimate
from tasks.manifests.subject import ImageMeasures

LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 46
"""Margins in px, for tick labels and axis titles."""
SECOND = 76
"""The right margin of a second axis, whose labels may be as long as 0.00025."""
SMALL_WIDTH, SMALL_MARGIN, SMALL_BOTTOM = 220, 18, 18
"""Of a chart in a table's cell, in px: its width, and the room for tick labels beside and below."""
CHARACTER = 7.7
"""Width of a tick label's character in px, at most."""
WHOLE = 0.995
"""Of a side: a crop that holds more is shown as none."""
LARGEST = 1e300
"""Values beyond are left out: differences of larger ones are not finite."""


@dataclass(frozen=True)
class Series:
    """One line: its points by x and y, and the CSS class of its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    role: str
    has_dots: bool = False


@dataclass(frozen=True)
class PlanePoint:
    """A model on the plane of two metrics, with the interval of each where it is known."""

    name: str
    x: Estimate
    y: Estimate
    role: str


@dataclass(frozen=True)
class Scale:
    """Maps values of an axis to px; `flip` for y, which SVG counts downwards."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Return the position of a value, in px."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, num: int = 5) -> list[float]:
        """Return round values within the axis, about `num` of them."""
        raw = (self.high - self.low) / num
        if not 1e-300 < raw < math.inf:  # no round steps at the ends of what a float holds
            return []
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        digits = max(0, 12 - math.floor(math.log10(step)))
        return [round(i * step, digits) for i in range(first, last + 1)]


def make_scale(values: Sequence[float], start: float, end: float, *, margin: float = 0.06) -> Scale:
    """Return a scale that holds all values, a margin around them; equal values get an axis around them."""
    return Scale(*widen(min(values), max(values), margin=margin), start, end)


def widen(low: float, high: float, *, margin: float, least: float = 0.5) -> tuple[float, float]:
    """Return the ends of an axis: wider than values by a margin, and by `least` where they are equal."""
    low, high = max(low, -LARGEST), min(high, LARGEST)
    space = (high - low) * margin
    if high - low <= 1e-9 * max(abs(low), abs(high)) or high - low < 1e-300:  # equal, up to rounding
        space = max(least, 0.1 * abs(high))
    return low - space, high + space


def keep_finite(estimate: Estimate) -> Estimate | None:
    """Return an estimate that can be drawn: without an interval that is not finite; None for such a mean."""
    if not is_drawable(estimate.mean):
        return None
    if all(value is not None and is_drawable(value) for value in (estimate.low, estimate.high)):
        return estimate
    return estimate.model_copy(update={"low": None, "high": None})


def is_drawable(value: float) -> bool:
    """Whether a value is finite, and its distance to others is too."""
    return math.isfinite(value) and abs(value) <= LARGEST


def show(value: float) -> str:
    """Return a tick's label."""
    return f"{value:.6g}".replace("-", "−")


def draw_axes(x: Scale, y: Scale, titles: tuple[str, str]) -> str:
    """Return grid, ticks and titles of both axes."""
    parts = []
    for value in x.ticks(8):
        at = x.place(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{y.start:.1f}" y2="{y.end:.1f}"/>')
        parts.append(f'<text x="{at:.1f}" y="{y.start + 17:.1f}" text-anchor="middle">{show(value)}</text>')
    for value in y.ticks():
        at = y.place(value)
        parts.append(f'<line class="grid" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{x.start - 7:.1f}" y="{at + 4:.1f}" text-anchor="end">{show(value)}</text>')
    across, up = (x.start + x.end) / 2, (y.start + y.end) / 2
    turned = f'transform="translate(14 {up:.1f}) rotate(-90)"'
    for place, title in zip((f'x="{across:.1f}" y="{y.start + 37:.1f}"', turned), titles, strict=True):
        parts.append(f'<text class="title" text-anchor="middle" {place}>{escape(title)}</text>')
    return "".join(parts)


def frame(body: str, size: tuple[int, int], label: str) -> Markup:
    """Return an SVG element that scales with the page."""
    head = f'<svg class="chart" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(label)}">'
    return Markup(f"{head}{body}</svg>")  # noqa: S704 - numbers, and texts that are escaped


def draw_lines(
    series: Sequence[Series],
    titles: tuple[str, str],
    *,
    size: tuple[int, int] = (680, 280),
    right: Series | None = None,
) -> Markup:
    """Return lines over a common x axis; y starts at 0, or below for negative values. Empty without points.

    Args:
        series: the lines.
        titles: of the x axis and of the y axis at the left.
        size: width and height in px.
        right: a line with an axis of its own at the right, named after it.

    """
    series = [replace(line, points=[p for p in line.points if all(map(is_drawable, p))]) for line in series]
    series = [line for line in series if line.points]
    points = [point for line in series for point in line.points]
    if not points:
        return Markup("")
    second = [] if right is None else [p for p in right.points if all(map(is_drawable, p))]
    x = make_scale([p[0] for p in points], LEFT, size[0] - (SECOND if second else RIGHT), margin=0.0)
    low, high = min(0.0, *(p[1] for p in points)), max(0.0, *(p[1] for p in points))
    y = Scale(low * 1.06, high * 1.06 if high - low > 1e-300 else 1.0, size[1] - BOTTOM, TOP)
    parts = [draw_axes(x, y, titles)]
    for line in series:
        placed = [(x.place(a), y.place(b)) for a, b in line.points]
        text = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
        parts.append(f'<polyline class="line {line.role}" points="{text}"/>')
        if line.has_dots:
            parts += [f'<circle class="dot {line.role}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in placed]
    if right is not None and second:
        right = replace(right, points=second)
        parts.append(draw_right_axis(right, x, y))
        series = [*series, right]
    names = ", ".join(f"{line.name} {show(line.points[0][1])} to {show(line.points[-1][1])}" for line in series)
    return frame("".join(parts), size, f"{titles[1]} by {titles[0]}: {names}")


def draw_right_axis(line: Series, x: Scale, y: Scale) -> str:
    """Return a line with the ticks and title of its own y axis, which begins at 0; `y` is the left one."""
    highest = max(value for _, value in line.points)
    own = Scale(0.0, highest * 1.06 if highest > 1e-300 else 1.0, y.start, y.end)
    parts = [f'<text x="{x.end + 7:.1f}" y="{own.place(value) + 4:.1f}">{show(value)}</text>' for value in own.ticks()]
    turned = f'transform="translate({x.end + SECOND - 6:.1f} {(y.start + y.end) / 2:.1f}) rotate(-90)"'
    parts.append(f'<text class="title" text-anchor="middle" {turned}>{escape(line.name)}</text>')
    text = " ".join(f"{x.place(a):.1f},{own.place(b):.1f}" for a, b in line.points)
    parts.append(f'<polyline class="line {line.role}" points="{text}"/>')
    return "".join(parts)


def draw_whisker(role: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    """Return an interval as a line between two points, in px."""
    ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line class="whisker {role}" {ends}/>'


def draw_values(values: Sequence[tuple[str, Estimate]], ceiling: Estimate | None, *, low: float, high: float) -> Markup:
    """Return base and tuned on one axis, one above the other, with intervals; a mark and a band for the photos."""
    values = [(role, kept) for role, estimate in values if (kept := keep_finite(estimate)) is not None]
    if not values or not (is_drawable(low) and is_drawable(high) and low < high):
        return Markup("")
    row = 15
    height = row * len(values) + 6
    x = Scale(low, high, SMALL_MARGIN, SMALL_WIDTH - SMALL_MARGIN)
    parts = [draw_small_axis(x, height)]
    ceiling = None if ceiling is None else keep_finite(ceiling)
    if ceiling is not None and ceiling.low is not None and ceiling.high is not None:
        ends = x.place(ceiling.low), x.place(ceiling.high)
        width = f'width="{ends[1] - ends[0]:.1f}"'
        parts.append(f'<rect class="ceiling-range" x="{ends[0]:.1f}" y="1" {width} height="{height - 2}"/>')
    for number, (role, estimate) in enumerate(values):
        at = 3 + row * number + row / 2
        if estimate.low is not None and estimate.high is not None:
            parts.append(draw_whisker(role, (x.place(estimate.low), at), (x.place(estimate.high), at)))
        parts.append(f'<circle class="dot {role}" cx="{x.place(estimate.mean):.1f}" cy="{at}" r="4.5"/>')
    if ceiling is not None:
        at = x.place(ceiling.mean)
        parts.append(f'<line class="ceiling" x1="{at:.1f}" x2="{at:.1f}" y1="1" y2="{height - 1}"/>')
    names = ", ".join(f"{role} {estimate.mean:.3f}" for role, estimate in values)
    size = (SMALL_WIDTH, height + SMALL_BOTTOM)
    return frame("".join(parts), size, f"{names}; axis from {show(low)} to {show(high)}")


def draw_small_axis(x: Scale, height: float) -> str:
    """Return the axis of a small chart, with as many ticks as their labels leave room for."""
    parts = [f'<line class="axis" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{height}" y2="{height}"/>']
    for num in range(5, 0, -1):
        ticks = [(x.place(value), show(value)) for value in x.ticks(num)]
        ends = [(at - CHARACTER * len(label) / 2, at + CHARACTER * len(label) / 2) for at, label in ticks]
        if all(one[1] < two[0] for one, two in itertools.pairwise(ends)):
            break
    for at, label in ticks:
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="1" y2="{height + 4}"/>')
        parts.append(f'<text x="{at:.1f}" y="{height + 15}" text-anchor="middle">{label}</text>')
    return "".join(parts)


def draw_plane(points: Sequence[PlanePoint], titles: tuple[str, str], *, size: tuple[int, int] = (680, 340)) -> Markup:
    """Return models on the plane of two metrics; checkpoints are joined in the order given. Empty without points."""
    kept = [(point, keep_finite(point.x), keep_finite(point.y)) for point in points]
    points = [replace(point, x=x, y=y) for point, x, y in kept if x is not None and y is not None]
    if not points:
        return Markup("")

    def extent(estimates: Sequence[Estimate]) -> list[float]:
        return [v for e in estimates for v in (e.mean, e.low, e.high) if v is not None]

    x = make_scale(extent([p.x for p in points]), LEFT, size[0] - RIGHT - 60)
    y = make_scale(extent([p.y for p in points]), size[1] - BOTTOM, TOP)
    parts = [draw_axes(x, y, titles)]
    path = [p for p in points if p.role != "base"]
    if len(path) > 1:
        text = " ".join(f"{x.place(p.x.mean):.1f},{y.place(p.y.mean):.1f}" for p in path)
        parts.append(f'<polyline class="line path" points="{text}"/>')
    for p in points:
        at = x.place(p.x.mean), y.place(p.y.mean)
        if p.x.low is not None and p.x.high is not None:
            parts.append(draw_whisker(p.role, (x.place(p.x.low), at[1]), (x.place(p.x.high), at[1])))
        if p.y.low is not None and p.y.high is not None:
            parts.append(draw_whisker(p.role, (at[0], y.place(p.y.low)), (at[0], y.place(p.y.high))))
        parts.append(f'<circle class="dot {p.role}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="6"/>')
        parts.append(f'<text class="name" x="{at[0] + 9:.1f}" y="{at[1] - 8:.1f}">{escape(p.name)}</text>')
    names = "; ".join(f"{p.name}: {p.x.mean:.3f}, {p.y.mean:.3f}" for p in points)
    return frame("".join(parts), size, f"{titles[0]} and {titles[1]} of {names}")


def draw_crops(boxes: Sequence[tuple[float, float, float, float]], photo: ImageMeasures) -> Markup:
    """Return the frames of crops over a photo, shaded around a single one; empty where a crop is the whole photo.

    Args:
        boxes: left, top, right and bottom as fractions of width and height.
        photo: whose width and height give the aspect ratio.

    """
    placed = [
        (left * photo.width, top * photo.height, (right - left) * photo.width, (bottom - top) * photo.height)
        for left, top, right, bottom in boxes
        if right - left < WHOLE or bottom - top < WHOLE
    ]
    if not placed:
        return Markup("")
    frames = "".join(
        f'<rect class="crop" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
        for x, y, width, height in placed
    )
    shade = ""
    if len(placed) == 1:  # several overlap, and even-odd would shade what two of them hold
        [(x, y, width, height)] = placed
        inner = f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z"
        shade = f'<path class="shade" d="M0 0h{photo.width}v{photo.height}h-{photo.width}z{inner}"/>'
    head = f'<svg viewBox="0 0 {photo.width} {photo.height}" aria-hidden="true">'
    return Markup(f"{head}{shade}{frames}</svg>")  # noqa: S704 - numbers
