"""The drawn world."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.mini.pretrain.tokens import RARE_TOKENS
from tasks.mini.world.scenes import (
    CLASS_NOUNS,
    COLORS,
    PLACES,
    caption_scene,
    draw_scene,
    sample_scene,
    sample_subject_scene,
    subject_look,
)


def test_drawing_a_scene_is_deterministic() -> None:
    scene = sample_scene(np.random.default_rng(3))
    assert draw_scene(scene).tobytes() == draw_scene(scene).tobytes()
    assert draw_scene(scene).size == (64, 64)


@pytest.mark.parametrize("noun", CLASS_NOUNS)
def test_every_class_noun_is_drawn_over_its_background(noun: str) -> None:
    first = draw_scene(sample_subject_scene(noun, seed=1, index=0))
    second = draw_scene(sample_subject_scene(noun, seed=2, index=0))
    assert np.asarray(first).std() > 20
    assert first.tobytes() != second.tobytes()


def test_the_world_has_the_documented_class_nouns_colors_and_backgrounds() -> None:
    assert len(CLASS_NOUNS) >= 10
    assert len(COLORS) == 10
    assert len(PLACES) == 8


def test_captions_often_omit_the_color_or_the_background() -> None:
    captions = []
    for seed in range(600):
        rng = np.random.default_rng([5, seed])
        captions.append((sample := sample_scene(rng), caption_scene(sample, rng)))
    colored = [any(f" {c} " in f" {text} " for c in COLORS) for _, text in captions]
    placed = [any(w in text for w in (" in ", " on ", " at ", "under", "indoors")) for _, text in captions]
    assert 0.3 < np.mean(colored) < 0.6
    assert 0.55 < np.mean(placed) < 0.8
    assert all(scene.class_noun in text for scene, text in captions)
    assert not any(token in text.split() for _, text in captions for token in RARE_TOKENS)


def test_pretraining_scenes_never_contain_the_appearance_of_a_subject() -> None:
    subjects = [subject_look(seed) for seed in range(200)]
    assert all(len({look.body, look.part, look.marking_color}) == 3 for look in subjects)
    for seed in range(2000):
        look = sample_scene(np.random.default_rng([1, seed])).look
        assert look.part is None or look.marking_color in (None, look.part)


def test_photos_of_a_subject_vary_the_background_and_share_its_appearance() -> None:
    scenes = [sample_subject_scene("mug", seed=4, index=i) for i in range(8)]
    assert {scene.place for scene in scenes} == set(PLACES)
    assert len({scene.look for scene in scenes}) == 1
    assert len({scene.pose for scene in scenes}) == 8


def test_the_subject_command_draws_photos_of_a_new_subject(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tasks.mini.world", "subject", "--class-noun", "mug", "--seed", "9"]
    subprocess.run([*command, "--num", "3", "--out", str(tmp_path / "a b")], check=True, capture_output=True)
    pictures = sorted((tmp_path / "a b").iterdir())
    assert len(pictures) == 3
    with Image.open(pictures[0]) as picture:
        assert picture.size == (256, 256)
