"""Photos trained in their own shape."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tasks.diffusion.registry import load_model
from tasks.training.data.batches import BatchFactory
from tasks.training.data.buckets import Size, choose_bucket, list_buckets
from tasks.training.process.worker_spec import TrainingSpec
from tests.support.tiny import describe_image, draw_photo, make_spec, read_unet, train_here

CPU = torch.device("cpu")


def framed_spec(folder: Path, model: Path, **changes: object) -> TrainingSpec:
    """A spec with a square, a wide and a tall photo."""
    spec = make_spec(folder, model, aspect_ratio_bucketing=True, **changes)
    images = []
    for index, size in enumerate([(128, 128), (150, 100), (80, 120)]):
        path = folder / f"framed-{index}.png"
        Image.new("RGB", size, "white").save(path)
        with Image.open(path) as canvas:
            canvas.paste(draw_photo(index, size=64), (5, 5))
            canvas.save(path)
        images.append(describe_image(path, "a photo of sks fish"))
    return spec.model_copy(update={"instance_images": tuple(images)})


@pytest.mark.parametrize("resolution", [64, 512, 768, 1024])
def test_buckets_have_at_most_the_pixels_of_the_square_resolution(resolution: int) -> None:
    sizes = list_buckets(resolution)
    step = 64 if resolution >= 512 else 8
    assert len(sizes) >= 5
    for size in sizes:
        assert size.width % step == size.height % step == 0
        assert size.width * size.height <= resolution**2
        assert max(size) <= 2 * min(size)
        assert Size(size.height, size.width) in sizes


def test_buckets_include_the_sdxl_shapes() -> None:
    assert {Size(1024, 1024), Size(1152, 896), Size(832, 1216), Size(1344, 768)} <= set(list_buckets(1024))


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((3000, 3000), (1024, 1024)),
        ((4000, 3000), (1152, 896)),
        ((3000, 4000), (896, 1152)),
        ((9000, 3000), (1408, 704)),
    ],
)
def test_a_photo_is_assigned_to_the_bucket_that_crops_least(picture: tuple[int, int], size: tuple[int, int]) -> None:
    assert choose_bucket(picture, 1024) == size


def test_each_bucket_size_of_a_batch_is_a_separate_forward(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = framed_spec(tmp_path, tiny_model_folder)
    batches = BatchFactory(load_model(spec.diffusion), spec).make([0, 1, 2], CPU)
    assert sorted(tuple(batch.latents.shape[2:]) for batch in batches) == [(12, 20), (16, 16), (20, 12)]
    assert sum(batch.sample_fraction for batch in batches) == pytest.approx(1)
    for batch in batches:
        assert len(batch.latents) == 2  # a photo and a class image cut like it
        height, width = batch.latents.shape[2:]
        assert batch.time_ids[:, 4:].tolist() == [[2 * height, 2 * width]] * 2


def test_latents_and_noise_do_not_depend_on_the_batch_composition(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = framed_spec(tmp_path, tiny_model_folder)
    maker = BatchFactory(load_model(spec.diffusion), spec)
    alone = [batch for i in (0, 1, 2) for batch in maker.make([i], CPU)]
    together = maker.make([0, 1, 2], CPU)
    for batch in together:
        assert any(torch.equal(batch.latents, one.latents) and torch.equal(batch.noise, one.noise) for one in alone)


def test_square_photos_train_the_same_with_and_without_buckets(tmp_path: Path, tiny_model_folder: Path) -> None:
    runs = [train_here(tmp_path / str(on), tiny_model_folder, aspect_ratio_bucketing=on) for on in (False, True)]
    first, second = (read_unet(run) for run in runs)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_photos_of_all_aspect_ratios_are_trained(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = framed_spec(tmp_path, tiny_model_folder, validation={"validation_steps": 4}, num_crop_variants=2)
    run = train_here(tmp_path, tiny_model_folder, spec=spec)
    rows = [json.loads(line) for line in run.losses.read_text().splitlines()]
    assert all(0 < row["loss"] < 10 for row in rows)
    assert len({path.name for path in spec.latents_paths()}) == 6
    assert all(path.is_file() for path in spec.latents_paths())
