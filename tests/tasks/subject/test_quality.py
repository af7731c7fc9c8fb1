"""Measures of photos."""

from PIL import Image, ImageFilter

from tasks.subject.quality import count_different_bits, measure
from tests.tiny import draw_photo


def test_blur_lowers_sharpness() -> None:
    photo = draw_photo(size=256)
    sharp, soft = measure(photo), measure(photo.filter(ImageFilter.GaussianBlur(4)))
    assert soft.sharpness < sharp.sharpness / 10


def test_light_is_measured() -> None:
    assert measure(Image.new("RGB", (64, 64), (255, 255, 255))).brightness == 1.0
    assert measure(Image.new("RGB", (64, 64))).contrast == 0.0


def test_hashes_tell_copies_from_other_photos() -> None:
    photo = draw_photo(size=256)
    copy, other = photo.resize((150, 150)), draw_photo(1, size=256)
    first = measure(photo).perceptual_hash
    assert count_different_bits(first, measure(copy).perceptual_hash) <= 6
    assert count_different_bits(first, measure(other).perceptual_hash) > 6
