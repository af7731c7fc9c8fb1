"""Measures of photos."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tasks.subject.photos.quality import find_salient_box, hamming_distance, measure
from tests.support.tiny import draw_photo


def test_blur_lowers_sharpness() -> None:
    photo = draw_photo(size=256)
    sharp, soft = measure(photo), measure(photo.filter(ImageFilter.GaussianBlur(4)))
    assert soft.sharpness < sharp.sharpness / 10


def test_brightness_and_contrast_are_measured() -> None:
    assert measure(Image.new("RGB", (64, 64), (255, 255, 255))).brightness == 1.0
    assert measure(Image.new("RGB", (64, 64))).contrast == 0.0


def test_perceptual_hashes_distinguish_copies_from_other_photos() -> None:
    photo = draw_photo(size=256)
    copy, other = photo.resize((150, 150)), draw_photo(1, size=256)
    first = measure(photo).perceptual_hash
    assert hamming_distance(first, measure(copy).perceptual_hash) <= 6
    assert hamming_distance(first, measure(other).perceptual_hash) > 6


def test_the_salient_box_encloses_the_salient_region() -> None:
    noise = np.random.default_rng(0).normal(128, 4, (256, 384, 3)).clip(0, 255).astype(np.uint8)
    photo = Image.fromarray(noise)
    ImageDraw.Draw(photo).ellipse((260, 60, 330, 130), fill=(220, 30, 30), outline=(0, 0, 0), width=6)
    box = find_salient_box(photo)
    x, y = box.find_center() or (0.0, 0.0)
    assert abs(x - 295 / 384) < 0.08
    assert abs(y - 95 / 256) < 0.08
    assert 0.02 < box.area < 0.25


def test_a_uniform_photo_has_a_salient_box_of_nonzero_area() -> None:
    assert find_salient_box(Image.new("RGB", (64, 64), "gray")).area > 0
