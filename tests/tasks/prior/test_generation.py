"""Class images: one seed each, kept one by one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.registry import load_model
from tasks.diffusion.sampling.devices import Devices, sample
from tasks.diffusion.sampling.job import SamplingJob, sample_in_batches
from tasks.errors import ConfigError
from tasks.images import SOURCE_TYPE, XMP_KEY, read_mark
from tasks.prior.config import PriorConfig
from tasks.prior.generation import check_picture, generate_class_images, plan_job
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.config import make_config
from tests.support.tiny import tiny_diffusion_config

CONFIG = make_config(PriorConfig, num_class_images=5, num_inference_steps=2, guidance_scale=2.0, batch_size=2)
TWO = Devices("prior.num_devices", 2)
PROMPT = "a photo of a fish"


class Stop(Exception):
    """Raised in the middle."""


def plan(seeds: list[int], diffusion: DiffusionConfig | None = None) -> SamplingJob:
    return plan_job(diffusion or tiny_diffusion_config(Path("unused")), CONFIG, class_prompt=PROMPT, seeds=seeds)


def generate(store: LocalStore, model: DiffusionModel, **options: object) -> tuple[object, ...]:
    return generate_class_images(
        StageFolder(store, "prior", "k"),
        options.get("config", CONFIG),  # type: ignore[arg-type]
        draw=options.get("draw", lambda seeds: sample_in_batches(model, plan(seeds))),  # type: ignore[arg-type]
        on_progress=options.get("on_progress", lambda done, total: None),  # type: ignore[arg-type]
    )


def test_an_interrupted_set_is_completed_not_regenerated(tmp_path: Path, tiny_model_folder: Path) -> None:
    model = load_model(tiny_diffusion_config(tiny_model_folder))
    whole = generate(LocalStore(tmp_path / "whole"), model)
    store = LocalStore(tmp_path / "cut")

    def stop_at_two(done: int, total: int) -> None:
        if done >= 2:
            raise Stop

    with pytest.raises(Stop):
        generate(store, model, on_progress=stop_at_two)
    steps: list[int] = []
    again = generate(store, model, on_progress=lambda done, total: steps.append(done))
    assert steps == [2, 3, 4, 5]
    assert [image.image.sha256 for image in again] == [image.image.sha256 for image in whole]  # type: ignore[attr-defined]
    assert [image.seed for image in again] == [0, 1, 2, 3, 4]  # type: ignore[attr-defined]


def test_a_foreign_file_is_replaced_by_the_generated_image(tmp_path: Path, tiny_model_folder: Path) -> None:
    model = load_model(tiny_diffusion_config(tiny_model_folder))
    store = LocalStore(tmp_path)
    store.put_bytes("02-prior/k/images/000001.png", b"not ours")
    images = generate(store, model)
    assert store.compute_sha256("02-prior/k/images/000001.png") == images[1].image.sha256  # type: ignore[attr-defined]
    assert SOURCE_TYPE in read_mark(store.find_bytes("02-prior/k/images/000001.png") or b"")[XMP_KEY]
    assert images[1].image.size_bytes > 100  # type: ignore[attr-defined]


def test_a_uniform_image_is_rejected() -> None:
    with pytest.raises(ConfigError, match="class image of seed 3 is flat"):
        check_picture(Image.new("RGB", (32, 32)), seed=3)


def test_a_complete_set_needs_no_model(tmp_path: Path, tiny_model_folder: Path) -> None:
    store = LocalStore(tmp_path)
    generate(store, load_model(tiny_diffusion_config(tiny_model_folder)))
    generate(store, None)  # type: ignore[arg-type]


def test_the_set_does_not_depend_on_the_number_of_devices(tmp_path: Path, tiny_model_folder: Path) -> None:
    diffusion = tiny_diffusion_config(tiny_model_folder)
    model = load_model(diffusion)
    one = generate(LocalStore(tmp_path / "one"), model)
    two = generate(LocalStore(tmp_path / "two"), model, draw=lambda seeds: sample(plan(seeds, diffusion), TWO))
    assert [image.seed for image in two] == [0, 1, 2, 3, 4]  # type: ignore[attr-defined]
    for first, second in zip(one, two, strict=True):
        a, b = (
            np.asarray(Image.open(tmp_path / place / image.image.key), int)  # type: ignore[attr-defined]
            for place, image in (("one", first), ("two", second))
        )
        assert np.abs(a - b).max() <= 1  # batches differ, so kernels may sum in another order


def test_a_failing_device_is_named_in_the_error(tmp_path: Path) -> None:
    drawing = sample(plan([1, 2, 3], tiny_diffusion_config(tmp_path)), TWO)
    with pytest.raises(ConfigError, match=r"on device \d failed \(exit code 1\): .*no model_index.json"):
        list(drawing)
