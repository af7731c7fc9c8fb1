"""Decode untrusted photo bytes to upright RGB: header checks first, bounded memory, one reason per failure."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tasks.redaction import clean_text, shorten
from tasks.subject.config import SubjectConfig

# Pillow opens the MPO files of phones through its JPEG plugin: a JPEG followed by a second view or a depth map.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "HEIF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".avif", ".heic", ".heif", ".hif")
ORIENTATION, FIRST_TURNED = 0x0112, 5  # EXIF orientations from 5 on swap width and height
ORIENTATIONS = range(1, 9)  # other values are invalid and count as upright
READABLE = "JPEG, PNG, WebP, GIF, AVIF or HEIC"


class Unfit(Exception):
    """The reason why a photo can't be used."""


@dataclass(frozen=True)
class DecodedPhoto:
    """Upright RGB pixels, the opacity mask, and the original size."""

    image: Image.Image
    mask: Image.Image | None
    """The opacity of a photo that was cut out."""
    size: tuple[int, int]
    """The photo's own width and height, upright, in pixels."""


def decode(data: bytes, config: SubjectConfig) -> DecodedPhoto:
    """Return a decoded photo.

    Raises:
        Unfit: the photo is unsuitable or damaged; no other exception escapes from a decoder.

    """
    if not data:
        raise Unfit("empty, unreadable, or over 64 MB")
    register_heif()
    try:
        with warnings.catch_warnings():
            # Pillow warns about large images and odd metadata. `check_header` decides, by its own limits.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                check_header(opened, config)
                width, height = opened.size  # before `draft` changes it
                orientation = opened.getexif().get(ORIENTATION, 1)
                is_known = orientation in ORIENTATIONS
                bound_memory(opened, config)
                upright = to_eight_bits(ImageOps.exif_transpose(opened) if is_known else opened)
                size = (height, width) if is_known and orientation >= FIRST_TURNED else (width, height)
                return DecodedPhoto(flatten(upright), find_mask(upright), size)
    except Unfit:
        raise
    except UnidentifiedImageError as error:
        raise Unfit(f"not a {READABLE} picture, whatever its name says") from error
    except Image.DecompressionBombError as error:
        raise Unfit("too large to decode (subject.max_pixels)") from error
    except MemoryError as error:
        raise Unfit("too large for this machine's memory") from error
    # Pillow and its plugins raise many types for damaged files and metadata: OSError, SyntaxError, ValueError,
    # TypeError, OverflowError, struct.error, ZeroDivisionError, KeyError, RuntimeError, ...
    except Exception as error:
        raise Unfit(
            f"damaged: {shorten(clean_text(str(error), keep=''), limit=120) or type(error).__name__}"
        ) from error


def register_heif() -> None:
    """Register HEIC decoding; pi-heif ships without the GPL encoder (see CONTRIBUTING.md)."""
    from pi_heif import register_heif_opener

    if "HEIF" not in Image.OPEN:
        register_heif_opener(thumbnails=False)


def check_header(opened: Image.Image, config: SubjectConfig) -> None:
    """Reject by the header, before any pixel is decoded. Raises Unfit."""
    width, height = opened.size
    if width * height > config.max_pixels:
        raise Unfit(f"too large: {width}x{height} px (subject.max_pixels)")
    if min(width, height) < config.min_side:
        raise Unfit(f"too small: {width}x{height} px, at least {config.min_side} a side (subject.min_side)")
    if max(width, height) > config.max_aspect * min(width, height):
        raise Unfit(f"aspect ratio too high: {width}x{height} px, at most {config.max_aspect:g}:1 (subject.max_aspect)")
    if getattr(opened, "is_animated", False) and opened.format in ("GIF", "PNG", "WEBP"):
        raise Unfit("animated")  # the further frames of an MPO, HEIC or AVIF are other views of the photo


def bound_memory(opened: Image.Image, config: SubjectConfig) -> None:
    """Let libjpeg decode an oversized JPEG at 1/2, 1/4 or 1/8 of its size; other formats ignore `draft`."""
    # Twice the working side, so that the final resize still has pixels to average.
    needed = 2 * (config.working_side or max(opened.size))
    factor = needed / min(opened.size)
    if factor < 1:
        opened.draft("RGB", (round(opened.width * factor), round(opened.height * factor)))


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit grayscale to 8 bits, with its transparent color as alpha; return other images unchanged."""
    if not image.mode.startswith("I;16"):
        return image
    gray = image.point(lambda value: value / 256).convert("L")
    clear = image.info.get("transparency")
    gray.info.pop("transparency", None)
    if not isinstance(clear, int):
        return gray
    opacity = (np.asarray(image) != clear).astype(np.uint8) * 255
    return Image.merge("LA", (gray, Image.fromarray(opacity)))


def flatten(image: Image.Image) -> Image.Image:
    """Composite over white and return RGB, rebuilt from raw bytes so that no metadata survives."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        base = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(base, layer)
    rgb = image.convert("RGB")
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())


def find_mask(image: Image.Image) -> Image.Image | None:
    """Return the alpha channel (L, 0..255) of a cut-out photo; None where it is all opaque or all transparent."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    low, high = alpha.getextrema()
    return alpha if low < 128 <= high else None  # type: ignore[operator]
