"""Files of generated images: where they go, and what they may replace."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.errors import ConfigError
from tasks.images import SOURCE_TYPE, XMP_KEY, encode_png, read_mark
from tasks.stage.files import write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from flows.cli.results.images.credentials import ContentCredentials


@dataclass(frozen=True)
class Target:
    """Where images go: a file, or files of a folder; and whether a grid of all is written too."""

    folder: Path
    file: Path | None = None
    has_grid: bool = False
    credentials: "ContentCredentials | None" = None

    def name(self, seed: int, number: int, *, num: int) -> Path:
        """Return the file of one image."""
        if num == 1:
            return self.file or self.folder / f"image-{seed}.png"
        if self.file is None:
            return self.folder / f"image-{seed}-{number:03d}.png"
        return self.file.with_name(f"{self.file.stem}-{number:03d}{self.file.suffix}")

    def grid(self) -> Path:
        """Return the grid's file."""
        return self.file.with_name(f"{self.file.stem}-grid.png") if self.file else self.folder / "grid.png"

    def check(self, *, num: int) -> None:
        """Refuse an output file that cannot be written, or would replace anything but a generated image.

        Raises:
            ConfigError: names the file.

        """
        if self.file is None:
            return
        check_target(self.file, option="--out")
        for path in [self.name(0, n, num=num) for n in range(num)] + ([self.grid()] if self.has_grid else []):
            check_replaceable(path)

    def write(self, path: Path, picture: "Picture", *, facts: Mapping[str, str]) -> Path:
        """Write one image and return its file: a default name that another image has is numbered."""
        if self.file is None:
            path = find_free(path, facts)
        data = encode_png(picture, is_generated=True, facts=facts)
        write(path, data if self.credentials is None else self.credentials.sign(data, title=path.name))
        return path


def check_target(path: Path, *, option: str) -> None:
    """Raise ConfigError for a file that is no PNG by its name, or in a folder that cannot be written."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{option} {str(path)!r} must name a file that ends in .png")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {path}: {parent} is no folder that can be written; choose another")


def read_generated(path: Path) -> dict[str, str] | None:
    """Return the text chunks of a PNG marked as generated; None for any other file."""
    from PIL.Image import DecompressionBombError

    try:
        mark = read_mark(path.read_bytes())
    except (OSError, SyntaxError, ValueError, DecompressionBombError):  # no image, damaged, or too large
        return None
    return mark if mark.get("Software") == "likeness" and SOURCE_TYPE in mark.get(XMP_KEY, "") else None


def check_replaceable(path: Path, *, option: str = "--out") -> None:
    """Raise ConfigError where a file exists that is no image of `likeness generate`."""
    if not os.path.lexists(path):
        return
    # A read-only file is an object of the store.
    if not path.is_file() or not path.stat().st_mode & 0o200 or read_generated(path) is None:
        raise ConfigError(f"{option}: {path} exists and is no generated image; choose another file")


def find_free(path: Path, facts: Mapping[str, str]) -> Path:
    """Return a path, numbered from 2 where other images have the names; the same image is replaced."""
    free, number = path, 1
    while os.path.lexists(free):
        mark = read_generated(free)
        if mark is not None and all(mark.get(name) == value for name, value in facts.items()):
            break
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def write(path: Path, data: bytes, *, option: str = "--out") -> None:
    """Write a picture. Raises ConfigError that names the option."""
    try:
        write_atomic(path, data)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; set {option}") from error
