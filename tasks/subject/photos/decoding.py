"""From the bytes of a photo to upright RGB pixels: header first, memory bounded, one reason for whatever goes wrong."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tasks.redaction import clean_text, shorten
from tasks.subject.config import SubjectConfig

# As JPEG also come the MPOs that phones write: the same picture, with a second view or a depth map behind it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "HEIF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".avif", ".heic", ".heif", ".hif")
ORIENTATION, FIRST_TURNED = 0x0112, 5  # EXIF: from 5 on width and height change places
ORIENTATIONS = range(1, 9)  # anything else that stands there means nothing: upright
READABLE = "JPEG, PNG, WebP, GIF, AVIF or HEIC"


class Unfit(Exception):
    """Why a photo can't be used."""


@dataclass(frozen=True)
class DecodedPhoto:
    """Upright RGB pixels, and what was known before they were made smaller."""

    image: Image.Image
    mask: Image.Image | None
    """The opacity of a photo that was cut out."""
    size: tuple[int, int]
    """The photo's own width and height, upright, in pixels."""


def decode(data: bytes, config: SubjectConfig) -> DecodedPhoto:
    """Return a decoded photo.

    Raises:
        Unfit: with the reason; whatever a decoder does, it costs this photo and nothing else.

    """
    if not data:
        raise Unfit("empty, unreadable, or over 64 MB")
    register_heif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                check_header(opened, config)
                width, height = opened.size
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
    # Pillow and its decoders answer damaged files and metadata with many kinds of errors: OSError, SyntaxError,
    # ValueError, TypeError, OverflowError, struct.error, ZeroDivisionError, KeyError, RuntimeError, ...
    except Exception as error:
        raise Unfit(
            f"damaged: {shorten(clean_text(str(error), keep=''), limit=120) or type(error).__name__}"
        ) from error


def register_heif() -> None:
    """Let Pillow read HEIC: decoders alone, without the encoder that is under the GPL (see CONTRIBUTING.md)."""
    from pi_heif import register_heif_opener

    if "HEIF" not in Image.OPEN:
        register_heif_opener(thumbnails=False)


def check_header(opened: Image.Image, config: SubjectConfig) -> None:
    """Refuse by what the header says, before a pixel is decoded. Raises Unfit."""
    width, height = opened.size
    if width * height > config.max_pixels:
        raise Unfit(f"too large: {width}x{height} px (subject.max_pixels)")
    if min(width, height) < config.min_side:
        raise Unfit(f"too small: {width}x{height} px, at least {config.min_side} a side (subject.min_side)")
    if max(width, height) > config.max_aspect * min(width, height):
        raise Unfit(f"too long and thin: {width}x{height} px, at most {config.max_aspect:g} to 1 (subject.max_aspect)")
    if getattr(opened, "is_animated", False) and opened.format in ("GIF", "PNG", "WEBP"):
        raise Unfit("animated")  # the further frames of an MPO, HEIC or AVIF are other views of the photo


def bound_memory(opened: Image.Image, config: SubjectConfig) -> None:
    """Let a JPEG that is far larger than needed be decoded at a half, a quarter or an eighth of its size."""
    needed = 2 * (config.working_side or max(opened.size))
    factor = needed / min(opened.size)
    if factor < 1:
        opened.draft("RGB", (round(opened.width * factor), round(opened.height * factor)))


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Return a gray picture of 16 bits with 8, its transparent colour as opacity; any other as it is."""
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
    """Return RGB pixels over white, rebuilt so that no metadata goes along."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        base = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(base, layer)
    rgb = image.convert("RGB")
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())


def find_mask(image: Image.Image) -> Image.Image | None:
    """Return the opacity of a photo that was cut out, or None where all or nothing is opaque."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    low, high = alpha.getextrema()
    return alpha if low < 128 <= high else None  # type: ignore[operator]
