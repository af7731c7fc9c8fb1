"""The objects of the drawn world: one drawing function per class noun, in object space [-1, 1], y down."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tasks.mini.world.canvas import (
    OUTLINE,
    Canvas,
    Color,
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
    """The appearance of one object: colors of its body, its second part and its marking."""

    body: Color
    part: Color | None = None
    marking: str = "none"
    marking_color: Color | None = None

    def second(self, plain: Color) -> Color:
        """Return the color of the second part, or the given one where the look has none."""
        return self.part or plain


def paint_body(canvas: Canvas, shape: list[Point], look: Look) -> None:
    """Fill the body, then its marking inside it, then trace its outline, which covers the marking's cut edges."""
    canvas.polygon(shape, look.body, outline=0)
    with canvas.clipped(shape) as inside:
        paint_marking(inside, look)
    canvas.line([*shape, shape[0], shape[1]])  # closed with one edge of overlap, as in `Canvas.polygon`


def paint_marking(canvas: Canvas, look: Look) -> None:
    """Paint a look's marking over all of object space; the caller clips it to the body."""
    color = look.marking_color
    if color is None:
        return
    if look.marking == "stripes":
        for x in (-0.9, -0.36, 0.18, 0.72):
            canvas.polygon([(x, -1), (x + 0.24, -1), (x + 0.24, 1), (x, 1)], color, outline=0)
    elif look.marking == "spots":
        for x, y in ((-0.5, -0.45), (0.1, -0.62), (0.5, -0.2), (-0.62, 0.3), (0.42, 0.5), (-0.1, 0.68)):
            canvas.ellipse((x, y), (0.17, 0.17), color, outline=0)
    elif look.marking == "band":
        canvas.polygon(box_points(-1, 0.22, 1, 0.56), color, outline=0)
    elif look.marking == "half":
        canvas.polygon([(-1, -1), (0, -1), (0, 1), (-1, 1)], color, outline=0)


def face(canvas: Canvas, center: Point, size: float = 1.0) -> None:
    """Draw two eyes and a smile."""
    x, y = center
    for side in (-1, 1):
        eye = (x + side * 0.2 * size, y)
        canvas.ellipse(eye, (0.085 * size, 0.115 * size), OUTLINE, outline=0)
        canvas.ellipse((eye[0] - 0.025, eye[1] - 0.04), (0.035 * size, 0.04 * size), WHITE, outline=0)
    mouth = ellipse_points((x, y + 0.1 * size), (0.11 * size, 0.11 * size), start=20, stop=160, num=8)
    canvas.line(mouth, width=0.05)


def draw_mug(canvas: Canvas, look: Look) -> None:
    """Draw a mug with its handle on the right."""
    # The handle is a ring: a disc, and a darker one in place of a hole.
    handle = look.second(shade(look.body, 0.8))
    canvas.ellipse((0.5, 0.08), (0.42, 0.42), handle)
    canvas.ellipse((0.5, 0.08), (0.2, 0.2), shade(handle, 0.45))
    paint_body(canvas, box_points(-0.78, -0.55, 0.48, 0.78, 0.16), look)
    canvas.ellipse((-0.15, -0.55), (0.63, 0.17), shade(look.body, 1.45))
    canvas.ellipse((-0.15, -0.53), (0.47, 0.09), (104, 62, 44), outline=0)
    face(canvas, (-0.15, 0.02))


def draw_house(canvas: Canvas, look: Look) -> None:
    """Draw a house with a pitched roof, a chimney and a door, back to front."""
    roof = look.second(shade(look.body, 0.62))
    canvas.polygon(box_points(0.34, -0.82, 0.58, -0.3), shade(roof, 0.8))
    paint_body(canvas, box_points(-0.7, -0.12, 0.7, 0.85), look)
    canvas.polygon([(-0.95, -0.1), (0, -0.92), (0.95, -0.1)], roof)
    canvas.polygon(box_points(-0.16, 0.4, 0.16, 0.85), shade(roof, 0.85))
    for x in (-0.42, 0.42):
        canvas.polygon(box_points(x - 0.16, 0.08, x + 0.16, 0.4), WINDOW)


def draw_fish(canvas: Canvas, look: Look) -> None:
    """Draw a fish that faces left."""
    fin = look.second(shade(look.body, 0.72))
    canvas.polygon([(0.5, 0), (0.98, -0.52), (0.86, 0), (0.98, 0.52)], fin)
    canvas.polygon([(-0.25, -0.42), (0.1, -0.86), (0.42, -0.36)], fin)
    paint_body(canvas, ellipse_points((-0.12, 0.05), (0.8, 0.55)), look)
    canvas.polygon([(0.02, 0.08), (0.42, 0.16), (0.1, 0.4)], fin)
    canvas.ellipse((-0.52, -0.08), (0.16, 0.18), WHITE, outline=0.05)
    canvas.ellipse((-0.56, -0.06), (0.08, 0.1), OUTLINE, outline=0)
    canvas.line(ellipse_points((-0.66, 0.2), (0.14, 0.12), start=20, stop=110, num=6), width=0.05)


def draw_tree(canvas: Canvas, look: Look) -> None:
    """Draw a tree with a round crown."""
    # Outlined lobes first; the ellipse without outline over them hides the outlines inside the crown.
    canvas.polygon([(-0.16, 0.3), (0.16, 0.3), (0.24, 0.95), (-0.24, 0.95)], look.second(BARK))
    lobes = [(-0.42, 0.02), (0.42, 0.02), (0.0, 0.16), (-0.26, -0.46), (0.26, -0.46)]
    for lobe in lobes:
        canvas.ellipse(lobe, (0.44, 0.42), look.body)
    canvas.ellipse((0, -0.16), (0.56, 0.5), look.body, outline=0)
    with canvas.clipped(ellipse_points((0, -0.16), (0.74, 0.64))) as inside:
        paint_marking(inside, look)
    face(canvas, (0, -0.16))


def draw_car(canvas: Canvas, look: Look) -> None:
    """Draw a small car seen from the side."""
    cabin = look.second(look.body)
    canvas.polygon([(-0.52, -0.1), (-0.34, -0.6), (0.3, -0.6), (0.58, -0.1)], cabin)
    canvas.polygon([(-0.38, -0.12), (-0.26, -0.46), (-0.04, -0.46), (-0.04, -0.12)], WINDOW, outline=0.05)
    canvas.polygon([(0.06, -0.12), (0.06, -0.46), (0.24, -0.46), (0.42, -0.12)], WINDOW, outline=0.05)
    paint_body(canvas, box_points(-0.95, -0.12, 0.95, 0.45, 0.18), look)
    canvas.ellipse((-0.84, 0.08), (0.09, 0.11), (255, 240, 150), outline=0.05)
    for x in (-0.5, 0.52):
        canvas.ellipse((x, 0.46), (0.27, 0.27), RUBBER)
        canvas.ellipse((x, 0.46), (0.11, 0.11), look.second(METAL), outline=0)


def draw_star(canvas: Canvas, look: Look) -> None:
    """Draw a five-pointed star with a face."""
    paint_body(canvas, star_points(0.98, 0.5), look)
    with canvas.clipped(star_points(0.98, 0.5)) as inside:
        inside.polygon(star_points(0.62, 0.32), look.second(shade(look.body, 1.3)), outline=0)
    face(canvas, (0, -0.02))


def draw_mushroom(canvas: Canvas, look: Look) -> None:
    """Draw a mushroom with a broad cap."""
    canvas.polygon([(-0.28, 0), (0.28, 0), (0.38, 0.86), (-0.38, 0.86)], look.second(CREAM))
    cap = ellipse_points((0, 0.08), (0.92, 0.92), start=180, stop=360)
    paint_body(canvas, [*cap, (0.86, 0.2), (-0.86, 0.2)], look)
    face(canvas, (0, 0.42))


def draw_robot(canvas: Canvas, look: Look) -> None:
    """Draw a robot with an antenna, two arms and two feet."""
    limb = look.second(METAL)
    canvas.line([(0, -0.7), (0, -0.92)], width=0.08)
    canvas.ellipse((0, -0.92), (0.1, 0.1), limb)
    for side in (-1, 1):
        canvas.polygon(box_points(side * 0.7 - 0.12, 0.08, side * 0.7 + 0.12, 0.56, 0.1), limb)
        canvas.polygon(box_points(side * 0.28 - 0.16, 0.68, side * 0.28 + 0.16, 0.95, 0.08), limb)
    paint_body(canvas, box_points(-0.55, 0.0, 0.55, 0.74, 0.1), look)
    canvas.polygon(box_points(-0.5, -0.72, 0.5, -0.04, 0.14), look.body)
    canvas.polygon(box_points(-0.38, -0.56, 0.38, -0.2, 0.1), (222, 240, 244), outline=0.05)
    for x in (-0.17, 0.17):
        canvas.ellipse((x, -0.38), (0.08, 0.1), OUTLINE, outline=0)


def draw_boat(canvas: Canvas, look: Look) -> None:
    """Draw a sailing boat."""
    sail = look.second(WHITE)
    canvas.line([(0.0, 0.3), (0.0, -0.92)], BARK, width=0.1)
    canvas.polygon([(0.08, -0.86), (0.74, 0.16), (0.08, 0.16)], sail)
    canvas.polygon([(-0.08, -0.7), (-0.6, 0.16), (-0.08, 0.16)], shade(sail, 0.88))
    paint_body(canvas, [(-0.95, 0.28), (0.95, 0.28), (0.64, 0.82), (-0.64, 0.82)], look)


def draw_balloon(canvas: Canvas, look: Look) -> None:
    """Draw a balloon on a string with a knot."""
    string = [(0.06 * math.sin(t * 1.3), 0.55 + 0.085 * t) for t in range(6)]
    canvas.line(string, width=0.05)
    paint_body(canvas, ellipse_points((0, -0.2), (0.64, 0.74)), look)
    canvas.polygon([(0, 0.5), (0.15, 0.7), (-0.15, 0.7)], look.second(shade(look.body, 0.75)))
    if look.part:
        canvas.polygon([(0, 0.56), (0.34, 0.44), (0.34, 0.72)], look.part)
        canvas.polygon([(0, 0.56), (-0.34, 0.44), (-0.34, 0.72)], look.part)
    canvas.ellipse((-0.28, -0.52), (0.11, 0.17), shade(look.body, 1.6), outline=0)
    face(canvas, (0, -0.1))


# The order defines CLASS_NOUNS and thereby class indices of the shipped classifier.
DRAWERS: dict[str, Callable[[Canvas, Look], None]] = {
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
