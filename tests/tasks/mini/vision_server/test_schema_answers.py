"""What the mini vision server measures of pixels."""

import numpy as np
from PIL import Image

from tasks.mini.vision_server.vision import compare_colors, count_colors
from tasks.mini.world.scenes import CLASS_NOUNS, COLORS, draw_scene, sample_subject_scene


def shared(seed: int, other: int) -> float:
    noun = CLASS_NOUNS[seed % len(CLASS_NOUNS)]
    sample = draw_scene(sample_subject_scene(noun, seed=other, index=5))
    photos = [draw_scene(sample_subject_scene(noun, seed=seed, index=i)) for i in range(3)]
    return float(np.mean([compare_colors(photo, sample) for photo in photos]))


def test_a_subject_shares_more_color_with_itself_than_with_another() -> None:
    same = np.array([shared(seed, seed) for seed in range(2000, 2060)])
    other = np.array([shared(seed, seed + 500) for seed in range(2000, 2060)])
    assert np.median(same) > 0.62
    assert np.median(other) < 0.54
    assert np.mean(same > other) > 0.85


def test_colors_are_counted_in_the_image_center() -> None:
    image = Image.new("RGB", (64, 64), COLORS["red"])
    counts = dict(zip(COLORS, count_colors(image), strict=False))
    assert counts["red"] == 1.0
    image.paste(COLORS["blue"], (0, 0, 64, 12))
    assert dict(zip(COLORS, count_colors(image), strict=False))["red"] == 1.0
