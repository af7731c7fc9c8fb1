"""PNG and JPEG encoding, PNG decoding, and the mark of generated pictures."""

import io
from collections.abc import Mapping

from PIL import Image
from PIL.PngImagePlugin import PngInfo

XMP_KEY = "XML:com.adobe.xmp"
"""The PNG text chunk that holds XMP (XMP specification, part 3, section 1.1.5)."""
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's digital source type of pictures made by a trained model, which platforms read to label them."""
XMP = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}" xmp:CreatorTool="likeness"/>
</rdf:RDF></x:xmpmeta><?xpacket end="r"?>"""


def encode_png(image: Image.Image, *, is_generated: bool = False, facts: Mapping[str, str] | None = None) -> bytes:
    """Return a picture as PNG; `facts` go into its text chunks, a generated one says so in text and XMP."""
    info = PngInfo()
    if is_generated:
        info.add_itxt(XMP_KEY, XMP)
        info.add_itxt("Software", "likeness")
    for name, value in (facts or {}).items():
        info.add_itxt(name, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def read_mark(data: bytes) -> dict[str, str]:
    """Return the text chunks of a PNG by name."""
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()  # text chunks may follow the pixels
        return {str(name): str(value) for name, value in getattr(opened, "text", {}).items()}


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
