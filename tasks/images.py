"""Pictures as bytes."""

import io

from PIL import Image


def encode_png(image: Image.Image) -> bytes:
    """Return a picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> Image.Image:
    """Return the RGB picture of PNG bytes that this project wrote."""
    with Image.open(io.BytesIO(data)) as opened:
        return opened.convert("RGB")


def shrink_png(data: bytes, *, max_side: int) -> bytes:
    """Return a PNG no larger than `max_side` pixels a side, its aspect kept."""
    picture = decode_png(data)
    if max(picture.size) <= max_side:
        return data
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return encode_png(picture)
