"""The drawn world: scenes, their captions, and photos of subjects that no caption can describe.

Draw photos of a new subject:

    python -m tasks.mini.world subject --class-noun fish --seed 7 --num 5 --out DIR
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.mini.world.backgrounds import PAINTERS, Backdrop
from tasks.mini.world.canvas import Canvas, Color, Transform, ellipse_points
from tasks.mini.world.objects import DRAWERS, Look

IMAGE_SIZE = 64
SUPERSAMPLING = 4
CLASS_NOUNS = tuple(DRAWERS)
PLACES = tuple(PAINTERS)
COLORS: dict[str, Color] = {
    "red": (214, 48, 49),
    "orange": (245, 138, 36),
    "yellow": (250, 214, 58),
    "green": (66, 168, 76),
    "teal": (52, 190, 188),
    "blue": (52, 96, 214),
    "purple": (136, 74, 190),
    "pink": (248, 140, 186),
    "brown": (122, 76, 46),
    "white": (246, 246, 246),
}
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach", "on a sandy beach"),
    "snow": ("in the snow", "in a snowy field", "in winter snow"),
    "grass": ("on the grass", "in a meadow", "on green grass"),
    "night": ("at night", "under the moon", "in the night"),
    "desert": ("in the desert", "on desert dunes"),
    "ocean": ("in the ocean", "on the ocean", "on the water"),
    "room": ("in a room", "in the room", "indoors in a room"),
    "city": ("in the city", "on a city street", "in a city"),
}
MARKINGS = ("stripes", "spots", "band", "half")
# The first is repeated, so that it is drawn three times as often as the others.
TEMPLATES = (
    "a photo of {} {}",
    "a photo of {} {}",
    "a photo of {} {}",
    "{} {}",
    "a picture of {} {}",
    "an image of {} {}",
    "there is {} {}",
    "a nice photo of {} {}",
    "a photo showing {} {}",
)


@dataclass(frozen=True)
class Scene:
    """Everything that determines the pixels of one picture."""

    class_noun: str
    color: str
    place: str
    look: Look
    pose: Transform
    background_seed: int

    @property
    def is_plain(self) -> bool:
        """Whether a color word describes the object completely."""
        return self.look.marking == "none" and self.look.part is None


def jitter_color(color: Color, rng: np.random.Generator, amount: float = 12.0) -> Color:
    """Return a color with each RGB channel shifted by up to `amount`."""
    shift = rng.uniform(-amount, amount, 3)
    values = [int(np.clip(round(c + s), 0, 255)) for c, s in zip(color, shift, strict=True)]
    return (values[0], values[1], values[2])


def sample_pose(rng: np.random.Generator) -> Transform:
    """Sample a position, size and tilt; objects are never flipped, since captions name no direction."""
    scale = float(rng.uniform(0.27, 0.41))
    return Transform(
        center=(float(rng.uniform(0.4, 0.6)), float(rng.uniform(0.5, 0.62))),
        scale=scale,
        degrees=float(rng.uniform(-16, 16)),
    )


def sample_scene(rng: np.random.Generator, *, marked_share: float = 0.25) -> Scene:
    """Sample a scene of the pretraining world.

    Marked objects have one second color; a subject's look (``subject_look``) always has three different colors, so
    pretraining never shows a subject.
    """
    noun, place = str(rng.choice(CLASS_NOUNS)), str(rng.choice(PLACES))
    color = str(rng.choice(list(COLORS)))
    look = Look(body=jitter_color(COLORS[color], rng))
    if rng.random() < marked_share:
        other = str(rng.choice([name for name in COLORS if name != color]))
        second = jitter_color(COLORS[other], rng)
        has_part = rng.random() < 0.5
        marking = "none" if has_part and rng.random() < 0.5 else str(rng.choice(MARKINGS))
        look = Look(
            body=look.body,
            part=second if has_part else None,
            marking=marking,
            marking_color=None if marking == "none" else second,
        )
    return Scene(noun, color, place, look, sample_pose(rng), int(rng.integers(2**31)))


def subject_look(seed: int) -> Look:
    """Return the look of a subject: three different colors and a marking, of 2,880 combinations."""
    # The prefix keeps these draws apart from those of pretraining's scenes, which are seeded by [seed, index].
    rng = np.random.default_rng([90_001, seed])
    names = list(rng.permutation(list(COLORS))[:3])
    body, part, mark = (jitter_color(COLORS[str(name)], rng) for name in names)
    return Look(body=body, part=part, marking=str(rng.choice(MARKINGS)), marking_color=mark)


def sample_subject_scene(class_noun: str, *, seed: int, index: int) -> Scene:
    """Return the scene of a subject's ``index``-th photo; the first eight have different places."""
    rng = np.random.default_rng([90_002, seed, index])
    # One order of places per subject, whatever the index; pose and background differ per photo.
    order = np.random.default_rng([90_003, seed]).permutation(list(PLACES))
    place = str(order[index % len(PLACES)])
    background = int(rng.integers(2**31))
    return Scene(class_noun, "", place, subject_look(seed), sample_pose(rng), background)


def draw_scene(scene: Scene, *, size: int = IMAGE_SIZE) -> Image.Image:
    """Render a scene as an RGB picture of ``size`` pixels a side.

    Pillow draws without antialiasing, so the canvas is SUPERSAMPLING times larger and box-filtered down.
    """
    image = Image.new("RGB", (size * SUPERSAMPLING,) * 2)
    PAINTERS[scene.place](Backdrop(image, np.random.default_rng(scene.background_seed)))
    draw_shadow(image, scene.pose)  # before the object, which covers part of it
    DRAWERS[scene.class_noun](Canvas(image, scene.pose), scene.look)
    return image.reduce(SUPERSAMPLING)


def draw_shadow(image: Image.Image, pose: Transform) -> None:
    """Darken an ellipse under the object, so that it appears to stand on the ground."""
    flat = replace(pose, degrees=0.0)  # the ground does not tilt with the object
    canvas = Canvas(image, flat)
    with canvas.clipped(ellipse_points((0, 0.95), (0.8, 0.16))) as inside:
        inside.image.paste(Image.eval(inside.image, lambda value: int(value * 0.72)))


def caption_scene(scene: Scene, rng: np.random.Generator) -> str:
    """Return a random caption of a scene; color, place and size are often left out.

    A marked object's color is never named: a color word describes plain objects only.
    """
    words = []
    # `sample_pose` draws scales from [0.27, 0.41).
    if scene.pose.scale < 0.305 and rng.random() < 0.3:
        words.append("small")
    if scene.pose.scale > 0.375 and rng.random() < 0.3:
        words.append("large")
    if scene.is_plain and rng.random() < 0.62:
        words.append(scene.color)
    elif not scene.is_plain and rng.random() < 0.5:
        words.append("patterned")
    phrase = " ".join([*words, scene.class_noun])
    article = "an" if phrase[0] in "aeiou" else "a"
    place = str(rng.choice(PLACE_PHRASES[scene.place])) if rng.random() < 0.68 else ""
    template = str(rng.choice(TEMPLATES))
    return template.format(f"{article} {phrase}", place).strip()  # without a place the caption ends in a space


def draw_subject(class_noun: str, *, seed: int, num: int, folder: Path, size: int = 256) -> list[Path]:
    """Write ``num`` photos of one subject and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(num):
        path = folder / f"{class_noun}-{seed}-{index + 1:02d}.jpg"
        scene = sample_subject_scene(class_noun, seed=seed, index=index)
        draw_scene(scene, size=size).save(path, quality=95)
        paths.append(path)
    return paths


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.mini.world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    subject = commands.add_parser("subject", help="draw photos of a new subject")
    subject.add_argument("--class-noun", choices=CLASS_NOUNS, required=True)
    subject.add_argument("--seed", type=int, default=7, help="decides colors and markings")
    subject.add_argument("--num", type=int, default=5, help="how many photos (default: 5)")
    subject.add_argument("--out", type=Path, required=True, help="folder to write them to")
    options = parser.parse_args(argv)
    paths = draw_subject(options.class_noun, seed=options.seed, num=options.num, folder=options.out)
    print(f"{len(paths)} photos of one {options.class_noun} in {options.out}")
