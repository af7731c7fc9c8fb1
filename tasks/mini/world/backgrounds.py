"""The eight places of the drawn world: each paints a background with random variations."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from tasks.mini.world.canvas import Canvas, Color, Point, Transform, box_points, ellipse_points, shade

CANVAS = Transform(center=(0.0, 0.0), scale=1.0)


class Backdrop:
    """A canvas addressed in fractions (0 to 1, y down) with the random generator of one background."""

    def __init__(self, image: Image.Image, rng: np.random.Generator) -> None:
        self.canvas = Canvas(image, CANVAS)
        self.rng = rng
        self.brightness = float(rng.uniform(0.92, 1.05))

    def uniform(self, low: float, high: float) -> float:
        """Draw one number for this background."""
        return float(self.rng.uniform(low, high))

    def fill(self, points: list[Point], color: Color) -> None:
        """Fill a shape in canvas fractions, without outline."""
        self.canvas.polygon(points, shade(color, self.brightness), outline=0)

    def sky(self, top: Color, bottom: Color, horizon: float) -> None:
        """Paint a vertical gradient from the top edge down to the horizon."""
        bands = 12  # 12 flat bands look smooth at 64 px; 0.01 of overlap leaves no gaps between them
        for i in range(bands):
            mix = i / (bands - 1)
            color = tuple(round(a + (b - a) * mix) for a, b in zip(top, bottom, strict=True))
            edges = (horizon * i / bands, horizon * (i + 1) / bands + 0.01)
            self.fill(box_points(0, edges[0], 1, edges[1]), (color[0], color[1], color[2]))

    def ground(self, horizon: float, color: Color, *, wave: float = 0.0, phase: float = 0.0) -> None:
        """Fill everything below a horizon, which is a sine of amplitude `wave`, shifted by `phase` periods."""
        xs = [i / 24 for i in range(25)]
        edge = [(x, horizon + wave * math.sin(2 * math.pi * (x * 1.2 + phase))) for x in xs]
        self.fill([*edge, (1, 1), (0, 1)], color)

    def disc(self, center: Point, radius: float, color: Color) -> None:
        """Fill a circle."""
        self.fill(ellipse_points(center, (radius, radius)), color)


def paint_beach(b: Backdrop) -> None:
    """Paint sun, sea and sand."""
    horizon = b.uniform(0.38, 0.48)
    b.sky((120, 196, 240), (206, 236, 250), horizon)
    b.disc((b.uniform(0.1, 0.9), b.uniform(0.08, 0.2)), 0.09, (255, 226, 110))
    b.fill(box_points(0, horizon, 1, horizon + 0.2), (52, 150, 200))
    b.ground(horizon + 0.17, (238, 214, 156), wave=0.025, phase=b.uniform(0, 1))


def paint_snow(b: Backdrop) -> None:
    """Paint pale hills, firs and falling snow."""
    horizon = b.uniform(0.45, 0.58)
    b.sky((186, 204, 222), (222, 230, 240), horizon + 0.1)
    for x in (b.uniform(0.02, 0.16), b.uniform(0.84, 0.98)):
        top = horizon - b.uniform(0.2, 0.3)
        b.fill([(x, top), (x + 0.12, horizon + 0.08), (x - 0.12, horizon + 0.08)], (92, 132, 128))
    b.ground(horizon, (244, 247, 252), wave=0.03, phase=b.uniform(0, 1))
    for _ in range(12):
        b.disc((b.uniform(0, 1), b.uniform(0, 0.9)), 0.014, (255, 255, 255))


def paint_grass(b: Backdrop) -> None:
    """Paint a meadow under a blue sky with clouds."""
    horizon = b.uniform(0.5, 0.6)
    b.sky((112, 186, 244), (198, 230, 252), horizon + 0.05)
    x, y = b.uniform(0.1, 0.9), b.uniform(0.1, 0.2)
    for dx, radius in ((-0.09, 0.05), (0, 0.075), (0.09, 0.05)):
        b.disc((x + dx, y), radius, (255, 255, 255))
    b.ground(horizon, (122, 196, 92), wave=0.03, phase=b.uniform(0, 1))
    b.ground(horizon + 0.17, (98, 176, 76), wave=0.03, phase=b.uniform(0, 1))
    for _ in range(5):
        b.disc((b.uniform(0, 1), b.uniform(0.85, 0.98)), 0.016, (250, 240, 160))


def paint_night(b: Backdrop) -> None:
    """Paint a moonlit night with stars."""
    horizon = b.uniform(0.7, 0.78)
    b.sky((22, 24, 64), (58, 54, 110), horizon + 0.05)
    moon = (b.uniform(0.12, 0.88), b.uniform(0.1, 0.2))
    b.disc(moon, 0.085, (250, 244, 210))
    # A disc in the color of the sky leaves a crescent.
    b.disc((moon[0] + 0.035, moon[1] - 0.02), 0.07, (32, 32, 76))
    for _ in range(12):
        b.disc((b.uniform(0, 1), b.uniform(0, 0.65)), 0.011, (240, 238, 220))
    b.ground(horizon, (36, 44, 62), wave=0.025, phase=b.uniform(0, 1))


def paint_desert(b: Backdrop) -> None:
    """Paint dunes and a cactus under a hot sky."""
    horizon = b.uniform(0.46, 0.56)
    b.sky((250, 196, 128), (255, 232, 180), horizon + 0.05)
    b.ground(horizon, (224, 156, 88), wave=0.05, phase=b.uniform(0, 1))
    x = b.uniform(0.04, 0.16) if b.uniform(0, 1) < 0.5 else b.uniform(0.84, 0.96)
    for box in ((-0.03, -0.2, 0.03, 0.12), (-0.1, -0.1, -0.06, 0), (0.06, -0.14, 0.1, -0.03)):
        b.fill(box_points(x + box[0], horizon + box[1], x + box[2], horizon + box[3], 0.02), (84, 140, 84))
    b.fill(box_points(x - 0.1, horizon - 0.03, x + 0.1, horizon, 0.01), (84, 140, 84))
    b.ground(horizon + 0.16, (208, 136, 72), wave=0.04, phase=b.uniform(0, 1))


def paint_ocean(b: Backdrop) -> None:
    """Paint open water with rows of waves."""
    horizon = b.uniform(0.22, 0.32)
    b.sky((168, 210, 236), (220, 238, 246), horizon + 0.03)
    b.fill(box_points(0, horizon, 1, 1), (34, 108, 178))
    phase = b.uniform(0, 1)
    for row in range(5):
        y = horizon + 0.07 + row * 0.155
        color = (30, 96 - 6 * row, 164 - 8 * row) if row % 2 else (56, 132, 196)
        xs = [i / 32 for i in range(33)]
        crest = [(x, y + 0.022 * math.sin(2 * math.pi * (4 * x + phase + row * 0.37))) for x in xs]
        b.fill([*crest, (1, y + 0.07), (0, y + 0.07)], color)


def paint_room(b: Backdrop) -> None:
    """Paint a papered wall, a window or picture, and a wooden floor."""
    horizon = b.uniform(0.6, 0.7)
    b.fill(box_points(0, 0, 1, horizon), (232, 206, 188))
    for i in range(0, 10, 2):  # every second strip: striped wallpaper
        b.fill(box_points(i / 10, 0, i / 10 + 0.1, horizon), (224, 194, 174))
    x = b.uniform(0.04, 0.2) if b.uniform(0, 1) < 0.5 else b.uniform(0.66, 0.8)
    b.fill(box_points(x - 0.02, 0.08, x + 0.2, 0.36), (255, 255, 255))
    b.fill(box_points(x, 0.1, x + 0.08, 0.34), (150, 206, 240))
    b.fill(box_points(x + 0.1, 0.1, x + 0.18, 0.34), (150, 206, 240))
    b.fill(box_points(0, horizon, 1, 1), (168, 116, 76))
    b.fill(box_points(0, horizon, 1, horizon + 0.03), (250, 240, 228))
    for y in (0.82, 0.92):
        b.fill(box_points(0, y, 1, y + 0.014), (138, 92, 60))


def paint_city(b: Backdrop) -> None:
    """Paint towers with lit windows along a road."""
    horizon = b.uniform(0.68, 0.76)
    b.sky((170, 184, 200), (214, 216, 222), horizon)
    x = -b.uniform(0, 0.1)  # the first tower may be cut by the edge
    while x < 1:
        width, top = b.uniform(0.16, 0.24), b.uniform(0.08, 0.38)
        tone = round(b.uniform(96, 140))
        b.fill(box_points(x, top, x + width - 0.02, horizon), (tone, tone + 4, tone + 20))
        for i in range(2):
            for j in range(5):
                wx, wy = x + 0.035 + i * 0.075, top + 0.05 + j * 0.11
                if wy + 0.05 < horizon:
                    b.fill(box_points(wx, wy, wx + 0.035, wy + 0.045), (252, 230, 150))
        x += width
    b.fill(box_points(0, horizon, 1, 1), (86, 88, 98))
    y = horizon + (1 - horizon) * 0.55
    for i in range(4):
        b.fill(box_points(0.06 + i * 0.27, y, 0.18 + i * 0.27, y + 0.025), (240, 236, 220))


# The order defines PLACES and thereby class indices of the shipped classifier.
PAINTERS: dict[str, Callable[[Backdrop], None]] = {
    "beach": paint_beach,
    "snow": paint_snow,
    "grass": paint_grass,
    "night": paint_night,
    "desert": paint_desert,
    "ocean": paint_ocean,
    "room": paint_room,
    "city": paint_city,
}
