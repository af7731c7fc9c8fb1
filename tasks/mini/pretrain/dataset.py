"""Rendered scenes on disk for pretraining: a memory-mapped array beside their seeds."""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from tasks.mini.world.scenes import (
    CLASS_NOUNS,
    COLORS,
    IMAGE_SIZE,
    PLACES,
    Scene,
    draw_scene,
    sample_pose,
    sample_scene,
)

CHUNK = 500
HELD_OUT_SEED = 7_777  # scenes of this seed are only ever used to measure


def scene_of(seed: int, index: int) -> Scene:
    """Return the scene that (seed, index) stands for."""
    return sample_scene(np.random.default_rng([seed, index]))


def view_of(seed: int, index: int, *, num_views: int) -> Scene:
    """Return one of several views of the same object: another place and pose each time."""
    scene = sample_scene(np.random.default_rng([seed, index // num_views]), marked_share=0.6)
    rng = np.random.default_rng([seed, index, 1])
    place = str(rng.choice(PLACES))
    return Scene(scene.class_noun, scene.color, place, scene.look, sample_pose(rng), int(rng.integers(2**31)))


def render(  # noqa: PLR0917 - called by a process pool
    seed: int, start: int, num: int, num_views: int
) -> np.ndarray:
    """Draw consecutive scenes as uint8 ``(num, 64, 64, 3)``."""
    images = np.empty((num, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for offset in range(num):
        index = start + offset
        scene = view_of(seed, index, num_views=num_views) if num_views else scene_of(seed, index)
        images[offset] = np.asarray(draw_scene(scene))
    return images


def load_or_render(path: Path, *, seed: int, num: int, num_views: int = 0) -> np.ndarray:
    """Return the scenes of a seed, drawn once and then mapped from disk."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        starts = range(0, num, CHUNK)
        job = partial(render, seed, num_views=num_views)
        with ProcessPoolExecutor() as pool:
            chunks = list(pool.map(job, starts, [min(CHUNK, num - s) for s in starts]))
        temporary = path.with_suffix(".part.npy")
        np.save(temporary, np.concatenate(chunks))
        temporary.rename(path)
    images: np.ndarray = np.load(path, mmap_mode="r")
    return images


def label_of(scene: Scene) -> tuple[int, int, int]:
    """Return indices of class noun, color (-1 for a marked object) and place."""
    color = list(COLORS).index(scene.color) if scene.is_plain else -1
    return CLASS_NOUNS.index(scene.class_noun), color, PLACES.index(scene.place)
