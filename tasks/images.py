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
