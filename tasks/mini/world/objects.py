"""The things of the drawn world: one small function per class noun."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tasks.mini.world.canvas import (
    OUTLINE,
    Color,
    Pen,
    Point,
    box_points,
    ellipse_points,
    shade,
    star_points,
)

WINDOW: Color = (190, 228, 246)
CREAM: Color = (250, 236, 205)
BARK: Color = (128, 84, 52)
METAL: Color = (150, 156, 168)
WHITE: Color = (250, 250, 250)
RUBBER: Color = (62, 60, 72)


@dataclass(frozen=True)
class Look:
    """What one object looks like: colors of its body, its second part and its marking."""

    body: Color
    part: Color | None = None
    marking: str = "none"
    marking_color: Color | None = None

    def second(self, plain: Color) -> Color:
        """Return the color of the second part, or the given one where the look has none."""
        return self.part or plain


def paint_body(pen: Pen, shape: list[Point], look: Look) -> None:
    """Fill the body, then its markings and a highlight inside it, then its outline."""
    pen.polygon(shape, look.body, outline=0)
    with pen.clipped(shape) as inside:
        paint_marking(inside, look)
    pen.line([*shape, shape[0], shape[1]])


def paint_marking(pen: Pen, look: Look) -> None:
    """Paint a look's marking over the whole of object space (the caller clips it)."""
    color = look.marking_color
    if color is None:
        return
    if look.marking == "stripes":
        for x in (-0.9, -0.36, 0.18, 0.72):
            pen.polygon([(x, -1), (x + 0.24, -1), (x + 0.24, 1), (x, 1)], color, outline=0)
    elif look.marking == "spots":
        for x, y in ((-0.5, -0.45), (0.1, -0.62), (0.5, -0.2), (-0.62, 0.3), (0.42, 0.5), (-0.1, 0.68)):
            pen.ellipse((x, y), (0.17, 0.17), color, outline=0)
    elif look.marking == "band":
        pen.polygon(box_points(-1, 0.22, 1, 0.56), color, outline=0)
    elif look.marking == "half":
        pen.polygon([(-1, -1), (0, -1), (0, 1), (-1, 1)], color, outline=0)


def face(pen: Pen, center: Point, size: float = 1.0) -> None:
    """Draw two vision and a smile."""
    x, y = center
    for side in (-1, 1):
        eye = (x + side * 0.2 * size, y)
        pen.ellipse(eye, (0.085 * size, 0.115 * size), OUTLINE, outline=0)
        pen.ellipse((eye[0] - 0.025, eye[1] - 0.04), (0.035 * size, 0.04 * size), WHITE, outline=0)
    mouth = ellipse_points((x, y + 0.1 * size), (0.11 * size, 0.11 * size), start=20, stop=160, num=8)
    pen.line(mouth, width=0.05)


def draw_mug(pen: Pen, look: Look) -> None:
    """Draw a mug with its handle on the right."""
    handle = look.second(shade(look.body, 0.8))
    pen.ellipse((0.5, 0.08), (0.42, 0.42), handle)
    pen.ellipse((0.5, 0.08), (0.2, 0.2), shade(handle, 0.45))
    paint_body(pen, box_points(-0.78, -0.55, 0.48, 0.78, 0.16), look)
    pen.ellipse((-0.15, -0.55), (0.63, 0.17), shade(look.body, 1.45))
    pen.ellipse((-0.15, -0.53), (0.47, 0.09), (104, 62, 44), outline=0)
    face(pen, (-0.15, 0.02))


def draw_house(pen: Pen, look: Look) -> None:
    """Draw a house with a pitched roof, a chimney and a door."""
    roof = look.second(shade(look.body, 0.62))
    pen.polygon(box_points(0.34, -0.82, 0.58, -0.3), shade(roof, 0.8))
    paint_body(pen, box_points(-0.7, -0.12, 0.7, 0.85), look)
    pen.polygon([(-0.95, -0.1), (0, -0.92), (0.95, -0.1)], roof)
    pen.polygon(box_points(-0.16, 0.4, 0.16, 0.85), shade(roof, 0.85))
    for x in (-0.42, 0.42):
        pen.polygon(box_points(x - 0.16, 0.08, x + 0.16, 0.4), WINDOW)


def draw_fish(pen: Pen, look: Look) -> None:
    """Draw a fish that swims to the left."""
    fin = look.second(shade(look.body, 0.72))
    pen.polygon([(0.5, 0), (0.98, -0.52), (0.86, 0), (0.98, 0.52)], fin)
    pen.polygon([(-0.25, -0.42), (0.1, -0.86), (0.42, -0.36)], fin)
    paint_body(pen, ellipse_points((-0.12, 0.05), (0.8, 0.55)), look)
    pen.polygon([(0.02, 0.08), (0.42, 0.16), (0.1, 0.4)], fin)
    pen.ellipse((-0.52, -0.08), (0.16, 0.18), WHITE, outline=0.05)
    pen.ellipse((-0.56, -0.06), (0.08, 0.1), OUTLINE, outline=0)
    pen.line(ellipse_points((-0.66, 0.2), (0.14, 0.12), start=20, stop=110, num=6), width=0.05)


def draw_tree(pen: Pen, look: Look) -> None:
    """Draw a tree with a round crown."""
    pen.polygon([(-0.16, 0.3), (0.16, 0.3), (0.24, 0.95), (-0.24, 0.95)], look.second(BARK))
    lobes = [(-0.42, 0.02), (0.42, 0.02), (0.0, 0.16), (-0.26, -0.46), (0.26, -0.46)]
    for lobe in lobes:
        pen.ellipse(lobe, (0.44, 0.42), look.body)
    pen.ellipse((0, -0.16), (0.56, 0.5), look.body, outline=0)
    with pen.clipped(ellipse_points((0, -0.16), (0.74, 0.64))) as inside:
        paint_marking(inside, look)
    face(pen, (0, -0.16))


def draw_car(pen: Pen, look: Look) -> None:
    """Draw a small car seen from the side."""
    cabin = look.second(look.body)
    pen.polygon([(-0.52, -0.1), (-0.34, -0.6), (0.3, -0.6), (0.58, -0.1)], cabin)
    pen.polygon([(-0.38, -0.12), (-0.26, -0.46), (-0.04, -0.46), (-0.04, -0.12)], WINDOW, outline=0.05)
    pen.polygon([(0.06, -0.12), (0.06, -0.46), (0.24, -0.46), (0.42, -0.12)], WINDOW, outline=0.05)
    paint_body(pen, box_points(-0.95, -0.12, 0.95, 0.45, 0.18), look)
    pen.ellipse((-0.84, 0.08), (0.09, 0.11), (255, 240, 150), outline=0.05)
    for x in (-0.5, 0.52):
        pen.ellipse((x, 0.46), (0.27, 0.27), RUBBER)
        pen.ellipse((x, 0.46), (0.11, 0.11), look.second(METAL), outline=0)


def draw_star(pen: Pen, look: Look) -> None:
    """Draw a five-pointed star with a face."""
    paint_body(pen, star_points(0.98, 0.5), look)
    with pen.clipped(star_points(0.98, 0.5)) as inside:
        inside.polygon(star_points(0.62, 0.32), look.second(shade(look.body, 1.3)), outline=0)
    face(pen, (0, -0.02))


def draw_mushroom(pen: Pen, look: Look) -> None:
    """Draw a mushroom with a broad cap."""
    pen.polygon([(-0.28, 0), (0.28, 0), (0.38, 0.86), (-0.38, 0.86)], look.second(CREAM))
    cap = ellipse_points((0, 0.08), (0.92, 0.92), start=180, stop=360)
    paint_body(pen, [*cap, (0.86, 0.2), (-0.86, 0.2)], look)
    face(pen, (0, 0.42))


def draw_robot(pen: Pen, look: Look) -> None:
    """Draw a robot with an antenna, two arms and two feet."""
    limb = look.second(METAL)
    pen.line([(0, -0.7), (0, -0.92)], width=0.08)
    pen.ellipse((0, -0.92), (0.1, 0.1), limb)
    for side in (-1, 1):
        pen.polygon(box_points(side * 0.7 - 0.12, 0.08, side * 0.7 + 0.12, 0.56, 0.1), limb)
        pen.polygon(box_points(side * 0.28 - 0.16, 0.68, side * 0.28 + 0.16, 0.95, 0.08), limb)
    paint_body(pen, box_points(-0.55, 0.0, 0.55, 0.74, 0.1), look)
    pen.polygon(box_points(-0.5, -0.72, 0.5, -0.04, 0.14), look.body)
    pen.polygon(box_points(-0.38, -0.56, 0.38, -0.2, 0.1), (222, 240, 244), outline=0.05)
    for x in (-0.17, 0.17):
        pen.ellipse((x, -0.38), (0.08, 0.1), OUTLINE, outline=0)


def draw_boat(pen: Pen, look: Look) -> None:
    """Draw a sailing boat."""
    sail = look.second(WHITE)
    pen.line([(0.0, 0.3), (0.0, -0.92)], BARK, width=0.1)
    pen.polygon([(0.08, -0.86), (0.74, 0.16), (0.08, 0.16)], sail)
    pen.polygon([(-0.08, -0.7), (-0.6, 0.16), (-0.08, 0.16)], shade(sail, 0.88))
    paint_body(pen, [(-0.95, 0.28), (0.95, 0.28), (0.64, 0.82), (-0.64, 0.82)], look)


def draw_balloon(pen: Pen, look: Look) -> None:
    """Draw a balloon on a string with a knot."""
    string = [(0.06 * math.sin(t * 1.3), 0.55 + 0.085 * t) for t in range(6)]
    pen.line(string, width=0.05)
    paint_body(pen, ellipse_points((0, -0.2), (0.64, 0.74)), look)
    pen.polygon([(0, 0.5), (0.15, 0.7), (-0.15, 0.7)], look.second(shade(look.body, 0.75)))
    if look.part:
        pen.polygon([(0, 0.56), (0.34, 0.44), (0.34, 0.72)], look.part)
        pen.polygon([(0, 0.56), (-0.34, 0.44), (-0.34, 0.72)], look.part)
    pen.ellipse((-0.28, -0.52), (0.11, 0.17), shade(look.body, 1.6), outline=0)
    face(pen, (0, -0.1))


DRAWERS: dict[str, Callable[[Pen, Look], None]] = {
    "mug": draw_mug,
    "house": draw_house,
    "fish": draw_fish,
    "tree": draw_tree,
    "car": draw_car,
    "star": draw_star,
    "mushroom": draw_mushroom,
    "robot": draw_robot,
    "boat": draw_boat,
    "balloon": draw_balloon,
}
