"""Pictures as PNG: pixels kept, and the mark of generated ones readable by others."""

import io

from PIL import Image

from tasks.images import SOURCE_TYPE, XMP_KEY, decode_png, encode_png, read_mark


def test_a_generated_picture_is_marked_in_text_and_xmp_and_keeps_its_pixels() -> None:
    picture = Image.radial_gradient("L").convert("RGB")
    plain, marked = encode_png(picture), encode_png(picture, is_generated=True, facts={"Title": "a fish — “sea”"})
    assert decode_png(marked).tobytes() == decode_png(plain).tobytes() == picture.tobytes()
    found = read_mark(marked)
    assert found["Title"] == "a fish — “sea”"
    assert SOURCE_TYPE in found[XMP_KEY]
    assert read_mark(plain) == {}
    with Image.open(io.BytesIO(marked)) as opened:  # as other programs find it
        assert SOURCE_TYPE.encode() in opened.info["xmp"]


def test_the_same_picture_has_the_same_bytes() -> None:
    picture = Image.new("RGB", (8, 8), "red")
    assert encode_png(picture, is_generated=True) == encode_png(picture, is_generated=True)
