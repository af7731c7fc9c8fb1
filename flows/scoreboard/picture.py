"""The scoreboard as a picture: a row per subject, a column per method, samples of the same prompt and seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from flows.scoreboard.plan import BASE
from flows.scoreboard.standings import Key, Loaded
from tasks.images import decode_png, encode_png
from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Sample, Side
from tasks.stage.cache import read_verified
from tasks.stage.files import write_atomic

PHOTO = "photo"
SIDE, HEAD, MARGIN = 160, 24, 4
"""Pixels."""


def write_picture(models: Mapping[Key, Loaded], path: Path, *, reference: str) -> Path:
    """Write the picture of the first prompt and seed, and return its path."""
    cells: dict[tuple[str, str], tuple[Loaded, ObjectRef]] = {}
    for (method, subject, _), loaded in models.items():
        if (subject, method) in cells:
            continue  # of the first training seed
        cells[subject, method] = loaded, find_sample(loaded, "tuned").image
        if method == reference:
            cells[subject, BASE] = loaded, find_sample(loaded, "base").image
        cells.setdefault((subject, PHOTO), (loaded, loaded.photo))
    methods = [PHOTO, BASE, *dict.fromkeys(method for method, _, _ in models)]
    write_atomic(path, encode_png(draw(cells, methods), is_generated=True))
    return path


def find_sample(loaded: Loaded, side: Side) -> Sample:
    """Return a side's first sample of the subject."""
    samples = loaded.candidate.evaluation.samples
    return next(sample for sample in samples if sample.kind == "subject" and sample.side == side)


def draw(cells: Mapping[tuple[str, str], tuple[Loaded, ObjectRef]], methods: Sequence[str]) -> Image.Image:
    """Return the labelled pictures; a missing one stays white."""
    subjects = list(dict.fromkeys(subject for subject, _ in cells))
    step = SIDE + MARGIN
    sheet = Image.new("RGB", (step * (len(methods) + 1), HEAD + step * len(subjects)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, method in enumerate(methods, 1):
        pen.text((column * step + 2, 4), method, fill="black", font=font)
    for row, subject in enumerate(subjects):
        pen.text((4, HEAD + row * step + SIDE // 2), subject, fill="black", font=font)
        for column, method in enumerate(methods, 1):
            if (subject, method) in cells:
                loaded, ref = cells[subject, method]
                picture = decode_png(read_verified(loaded.store, ref)).convert("RGB")
                square = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                sheet.paste(square, (column * step, HEAD + row * step))
    return sheet
