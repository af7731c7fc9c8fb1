"""Contact sheets: pictures in rows and columns with labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

GRID_SIDE = 256
SMALLEST, LARGEST = 128, 256
"""Sides of a cell in px: smaller pictures are enlarged, so that labels have room."""
FONT_SIZE, LINE, GAP, MARGIN = 13, 17, 8, 6
LABEL_WIDTH = 190
MISSING = "#dddddd"


@dataclass(frozen=True)
class Sheet:
    """Labels of columns and rows, and a picture or None per cell; one that is missing is left grey."""

    columns: Sequence[str]
    rows: Sequence[str]
    cells: "Sequence[Sequence[Picture | None]]"


def draw_grid(pictures: "Sequence[Picture | None]", *, columns: int) -> "Picture":
    """Return the pictures in rows of one prompt each; all in one near-square grid where each prompt has one.

    At least one is there; a missing one is left grey.
    """
    columns = columns if columns > 1 else math.ceil(math.sqrt(len(pictures)))
    side = min(GRID_SIDE, next(picture.width for picture in pictures if picture is not None))
    grid = Image.new("RGB", (columns * side, math.ceil(len(pictures) / columns) * side), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        cell = MISSING if picture is None else picture.resize((side, side), Image.Resampling.LANCZOS)
        grid.paste(cell, (column * side, row * side, (column + 1) * side, (row + 1) * side))
    return grid


def fit(picture: "Picture") -> "Picture":
    """Return a picture at the side of a cell; a small one keeps its pixels visible."""
    side = min(LARGEST, max(SMALLEST, *picture.size))
    resample = Image.Resampling.NEAREST if max(picture.size) < side else Image.Resampling.LANCZOS
    scale = side / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), resample)


def draw_contact_sheet(sheet: Sheet) -> "Picture":
    """Return the sheet: column labels above, row labels at the left."""
    font = ImageFont.load_default(size=FONT_SIZE)
    fitted = [[None if cell is None else fit(cell) for cell in row] for row in sheet.cells]
    side = max((max(cell.size) for row in fitted for cell in row if cell is not None), default=SMALLEST)
    heads = [wrap(label, font, width=side) for label in sheet.columns]
    labels = [wrap(label, font, width=LABEL_WIDTH) for label in sheet.rows]
    top = MARGIN + LINE * max(map(len, heads)) + MARGIN
    left = MARGIN + LABEL_WIDTH + GAP
    step = side + GAP
    heights = [max(side, LINE * len(label)) + GAP for label in labels]
    canvas = Image.new("RGB", (left + step * len(sheet.columns), top + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    for number, lines in enumerate(heads):
        write_lines(draw, (left + step * number, MARGIN), lines, font=font)
    y = top
    for lines, row, height in zip(labels, fitted, heights, strict=True):
        write_lines(draw, (MARGIN, y), lines, font=font)
        for number, cell in enumerate(row):
            x = left + step * number
            if cell is None:
                draw.rectangle((x, y, x + side - 1, y + side - 1), fill=MISSING)
            else:
                canvas.paste(cell, (x, y))
        y += height
    return canvas


def write_lines(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], *, font: "Font") -> None:
    """Draw lines of text below each other."""
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + LINE * number), line, fill="#222222", font=font)


def wrap(text: str, font: "Font", *, width: int, most: int = 8) -> list[str]:
    """Return a text in lines of at most `width` px, broken within words where needed; a longer one is cut."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for char in paragraph:
            if line and font.getlength(line + char) > width:
                # At the last space where there is one; a long name has none.
                head, space, tail = line.rpartition(" ") if char != " " else (line, " ", "")
                lines.append(head if space and head else line)
                line = tail + char.strip() if space and head else char
            else:
                line += char
        lines.append(line)
    return lines if len(lines) <= most else [*lines[: most - 1], "…"]
