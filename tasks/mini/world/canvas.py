"""Vector drawing: polygons on a Pillow canvas under one affine transform."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Point = tuple[float, float]

OUTLINE: Color = (46, 38, 58)


@dataclass(frozen=True)
class Transform:
    """Map object space (``[-1, 1]`` on both axes, y down) to canvas fractions ``[0, 1]``."""

    center: Point = (0.5, 0.5)
    scale: float = 0.5
    degrees: float = 0.0

    def apply(self, point: Point) -> Point:
        """Return the canvas fraction of one object-space point."""
        x, y = point
        angle = math.radians(self.degrees)
        cos, sin = math.cos(angle), math.sin(angle)  # y points down, so positive angles turn clockwise
        return (
            self.center[0] + self.scale * (x * cos - y * sin),
            self.center[1] + self.scale * (x * sin + y * cos),
        )


class Canvas:
    """Draws filled, outlined shapes on a square canvas."""

    def __init__(self, image: Image.Image, transform: Transform) -> None:
        self.image = image
        self.transform = transform
        self.draw = ImageDraw.Draw(image)

    def points(self, points: Sequence[Point]) -> list[Point]:
        """Return canvas pixels for object-space points."""
        size = self.image.width
        return [(x * size, y * size) for x, y in map(self.transform.apply, points)]

    def width(self, width: float) -> int:
        """Return a line width in pixels for a width in object space."""
        return max(1, round(width * self.transform.scale * self.image.width))

    def polygon(self, points: Sequence[Point], fill: Color, *, outline: float = 0.07) -> None:
        """Fill a closed shape and trace its outline with round joints."""
        pixels = self.points(points)
        self.draw.polygon(pixels, fill=fill)
        # The first edge is traced twice: Pillow rounds joints only between edges, so the start needs one too.
        if outline:
            self._trace([*pixels, pixels[0], pixels[1]], OUTLINE, self.width(outline))

    def line(self, points: Sequence[Point], color: Color = OUTLINE, *, width: float = 0.07) -> None:
        """Draw an open path with round joints; `width` is in object space."""
        self._trace(self.points(points), color, self.width(width))

    def _trace(self, pixels: Sequence[Point], color: Color, width: int) -> None:
        self.draw.line(list(pixels), fill=color, width=width, joint="curve")

    def ellipse(self, center: Point, radii: Point, fill: Color, *, outline: float = 0.07) -> None:
        """Fill an ellipse, as a polygon: Pillow's own ellipses can't be rotated."""
        self.polygon(ellipse_points(center, radii), fill, outline=outline)

    def clipped(self, outline_of: Sequence[Point]) -> "Clip":
        """Return a context manager that paints only inside the given shape."""
        return Clip(self, outline_of)


class Clip:
    """A clip path: what is painted goes to a copy of the image, which is then pasted through a mask."""

    def __init__(self, canvas: Canvas, shape: Sequence[Point]) -> None:
        self.canvas = canvas
        self.mask = Image.new("L", canvas.image.size, 0)
        ImageDraw.Draw(self.mask).polygon(canvas.points(shape), fill=255)

    def __enter__(self) -> Canvas:
        self.layer = self.canvas.image.copy()
        return Canvas(self.layer, self.canvas.transform)

    def __exit__(self, *_: object) -> None:
        self.canvas.image.paste(self.layer, (0, 0), self.mask)


def ellipse_points(
    center: Point, radii: Point, *, start: float = 0.0, stop: float = 360.0, num: int = 28
) -> list[Point]:
    """Return points along an elliptic arc; angles are in degrees clockwise from the positive x axis."""
    # A full ellipse has no last point, since polygons close themselves; an arc needs both ends.
    angles = [math.radians(start + (stop - start) * i / num) for i in range(num + (stop < 360))]
    return [(center[0] + radii[0] * math.cos(a), center[1] + radii[1] * math.sin(a)) for a in angles]


def box_points(  # noqa: PLR0917 - a box, in Pillow's order
    left: float, top: float, right: float, bottom: float, r: float = 0.0
) -> list[Point]:
    """Return a rectangle with corners rounded by radius ``r``."""
    if not r:
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    corners = [(right - r, top + r, 270), (right - r, bottom - r, 0), (left + r, bottom - r, 90)]
    corners.append((left + r, top + r, 180))
    # 89.9 rather than 90: a corner that stops at 360 would count as a full ellipse and lose its last point.
    return [
        point
        for x, y, start in corners
        for point in ellipse_points((x, y), (r, r), start=start, stop=start + 89.9, num=5)
    ]


def star_points(outer: float, inner: float, num: int = 5) -> list[Point]:
    """Return a star with one tip up, alternating between both radii."""
    steps = [(outer if i % 2 == 0 else inner, math.pi * i / num - math.pi / 2) for i in range(2 * num)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in steps]


def shade(color: Color, factor: float) -> Color:
    """Darken (factor in [0, 1]) or lighten toward white (factor in [1, 2]) a color."""
    if factor <= 1:
        mixed = [c * factor for c in color]
    else:
        mixed = [c + (255 - c) * (factor - 1) for c in color]
    return (round(mixed[0]), round(mixed[1]), round(mixed[2]))
