"""Options of the prior stage: without its option a test here fails."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks.diffusion.registry import load_model
from tasks.diffusion.sampling.job import sample_in_batches
from tasks.errors import ConfigError
from tasks.manifests.base import ModelRef
from tasks.prior.config import PriorConfig
from tasks.prior.generation import generate_class_images, plan_job
from tasks.prior.steps import PriorInputs, compute_prior
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.config import make_config
from tests.support.tiny import CountingModel, tiny_diffusion_config

PROMPT = "a photo of a fish"


def draw(folder: Path, model: Path, **changes: Any) -> tuple[dict[int, np.ndarray], list[int]]:
    """Return the pictures by seed, and the sizes of the batches that they were drawn in."""
    settings = {"num_class_images": 4, "num_inference_steps": 2, "guidance_scale": 2.0, "batch_size": 4, **changes}
    config = make_config(PriorConfig, **settings)
    diffusion = tiny_diffusion_config(model)
    counted: Any = CountingModel(load_model(diffusion))
    store = LocalStore(folder)
    images = generate_class_images(
        StageFolder(store, "prior", "k"),
        config,
        draw=lambda seeds: sample_in_batches(counted, plan_job(diffusion, config, class_prompt=PROMPT, seeds=seeds)),
        on_progress=lambda done, total: None,
    )
    found = {image.seed: np.asarray(Image.open(folder / image.image.key), int) for image in images}
    return found, counted.sizes


def test_num_class_images_batch_size_and_seed_determine_the_class_images(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    pictures, sizes = draw(tmp_path, tiny_model_folder, num_class_images=5, batch_size=2, seed=7)
    assert list(pictures) == [7, 8, 9, 10, 11]
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("changes", [{"num_inference_steps": 4}, {"guidance_scale": 9.0}])
def test_num_inference_steps_and_guidance_scale_change_the_images(
    tmp_path: Path, tiny_model_folder: Path, changes: dict[str, Any]
) -> None:
    plain, _ = draw(tmp_path / "plain", tiny_model_folder)
    other, _ = draw(tmp_path / "other", tiny_model_folder, **changes)
    assert any(not np.array_equal(plain[seed], other[seed]) for seed in plain)


def test_num_devices_selects_multi_device_generation(tmp_path: Path) -> None:
    diffusion = tiny_diffusion_config(tmp_path / "no model")
    folder = StageFolder(LocalStore(tmp_path / "store"), "prior", "k")
    runtime: Any = SimpleNamespace(
        progress_callback=lambda name: lambda done, total: None, wait_note=lambda name: lambda what: None
    )
    base = ModelRef(location="x", revision=None, sha256="0")
    for num_devices, message in ((2, r"on device \d failed"), (1, r"^(?!.*on device)")):
        config = make_config(PriorConfig, num_class_images=2, batch_size=1, num_devices=num_devices)
        with pytest.raises(ConfigError, match=message):
            compute_prior(folder, PriorInputs(config, diffusion, base, "fish"), runtime)
