"""PNG and JPEG encoding, PNG decoding."""

import io

from PIL import Image


def encode_png(image: Image.Image) -> bytes:
    """Return a picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> Image.Image:
    """Return an RGB image from PNG bytes written by this project; there are no checks against hostile files."""
    with Image.open(io.BytesIO(data)) as opened:
        return opened.convert("RGB")


def shrink_png(data: bytes, *, max_side: int) -> bytes:
    """Return a PNG of at most `max_side` pixels a side, with its aspect ratio kept."""
    picture = decode_png(data)
    if max(picture.size) <= max_side:
        return data
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return encode_png(picture)


def encode_jpeg(image: Image.Image, *, quality: int = 85) -> bytes:
    """Return a picture as JPEG."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()
