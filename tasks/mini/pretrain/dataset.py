"""Rendered scenes on disk for pretraining: a memory-mapped array; labels are recomputed from seed and index."""

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
HELD_OUT_SEED = 7_777  # scenes of this seed are used for evaluation only


def scene_of(seed: int, index: int) -> Scene:
    """Return the scene of (seed, index)."""
    return sample_scene(np.random.default_rng([seed, index]))


def view_of(seed: int, index: int, *, num_views: int) -> Scene:
    """Return one of `num_views` views of the same object, with a place and pose of its own."""
    # More marked objects than in `sample_scene`: the encoder has to tell objects apart by their markings.
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
    """Return scenes as uint8 ``(num, 64, 64, 3)``, rendered once and then memory-mapped."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        starts = range(0, num, CHUNK)
        job = partial(render, seed, num_views=num_views)
        # Scenes depend on (seed, index) alone, so the array is the same for any number of processes.
        with ProcessPoolExecutor() as pool:
            chunks = list(pool.map(job, starts, [min(CHUNK, num - s) for s in starts]))
        temporary = path.with_suffix(".part.npy")  # keeps the suffix .npy, which np.save would append
        np.save(temporary, np.concatenate(chunks))
        temporary.rename(path)
    images: np.ndarray = np.load(path, mmap_mode="r")
    return images


def label_of(scene: Scene) -> tuple[int, int, int]:
    """Return indices of class noun, color (-1 for a marked object) and place."""
    color = list(COLORS).index(scene.color) if scene.is_plain else -1
    return CLASS_NOUNS.index(scene.class_noun), color, PLACES.index(scene.place)
