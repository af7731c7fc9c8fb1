"""Copy detection with real encoders and drawn photos of one subject."""

from collections.abc import Sequence

import pytest
import torch
from PIL import Image, ImageFilter

from tasks.encoders.config import EncoderConfig
from tasks.encoders.embeddings import Encoders
from tasks.evaluation.metrics import Features, extract_features, measure_copies
from tests.support.config import make_config
from tests.support.tiny import draw_photo

PHOTOS = [draw_photo(index, size=256) for index in range(5)]


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    config = make_config(EncoderConfig, clip="mini", dino="mini", dino_resize=None)
    return Encoders(config, torch.device("cpu"))


def count(encoders: Encoders, pictures: Sequence[Image.Image]) -> float:
    def encode(images: Sequence[Image.Image]) -> Features:
        return extract_features(encoders, images, ["a photo of a fish"] * len(images))

    copies = measure_copies(encode(pictures), encode(PHOTOS))
    assert copies is not None
    return float(copies.sum())


def test_photos_that_are_scaled_softened_or_noised_count_as_copies(encoders: Encoders) -> None:
    smaller = [photo.resize((64, 64), Image.Resampling.LANCZOS) for photo in PHOTOS]
    softer = [photo.filter(ImageFilter.GaussianBlur(1)) for photo in PHOTOS]
    grain = Image.effect_noise((256, 256), 40).convert("RGB")
    noised = [Image.blend(photo, grain, 0.1) for photo in PHOTOS]
    assert [count(encoders, changed) for changed in (smaller, softer, noised)] == [5, 5, 5]


def test_new_photos_of_the_same_subject_are_rarely_taken_for_copies(encoders: Encoders) -> None:
    others = [draw_photo(index, size=256) for index in range(5, 25)]
    # Chance views: one in twenty at most. By the distance of the two nearest photos alone, it would be a third.
    assert count(encoders, others) <= 1
