"""Defects that trainers of this field shipped silently, each in the configuration that showed it there."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from tasks.diffusion.noise_schedulers import GaussianDiffusion, RectifiedFlow
from tasks.diffusion.registry import load_model
from tasks.training.data import rng
from tasks.training.data.batches import BatchFactory
from tasks.training.data.datamodule import SampleIndices
from tasks.training.losses import min_snr_weights, prior_preservation_loss
from tasks.training.process.worker_spec import TrainingSpec
from tests.support.tiny import make_spec

CPU = torch.device("cpu")
PROMPTS = ("a photo of sks fish", "sks fish in the snow", "sks fish on the beach")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> tuple[TrainingSpec, BatchFactory]:
    """Three photos with a caption each and four class images."""
    spec = make_spec(tmp_path_factory.mktemp("captioned"), tiny_model_folder, flip_probability=0.5)
    images = tuple(
        image.model_copy(update={"prompt": prompt}) for image, prompt in zip(spec.instance_images, PROMPTS, strict=True)
    )
    spec = spec.model_copy(update={"instance_images": images})
    return spec, BatchFactory(load_model(spec.diffusion), spec)


def indices_of(spec: TrainingSpec, *, rank: int, world_size: int, num: int) -> list[int]:
    counter = SampleIndices(spec, start_step=0, rank=rank, world_size=world_size)
    return [int(i) for batch in islice(counter, num) for i in batch]


def test_d1_cached_latents_stay_with_their_captions(captioned: tuple[TrainingSpec, BatchFactory]) -> None:
    spec, maker = captioned
    indices = list(range(60))
    [batch] = maker.make(indices, CPU)
    images = maker.buckets[0].sets["instance"]
    eps = rng.draw_normal(tuple(images.mean.shape[2:]), seed=spec.seed, purpose="instance/posterior", indices=indices)
    for row in range(60):
        item = next(i for i in range(3) if torch.equal(images.input_ids[i], batch.input_ids[row]))
        candidates = images.mean[item] + images.std[item] * eps[row]
        assert any(torch.equal(candidate, batch.latents[row]) for candidate in candidates)
    assert len({tuple(row) for row in batch.input_ids[:60].tolist()}) == 3


def test_d2_every_rank_sees_every_image(captioned: tuple[TrainingSpec, BatchFactory]) -> None:
    spec, maker = captioned
    for rank in range(2):
        indices = indices_of(spec, rank=rank, world_size=2, num=9)
        items = rng.choose_items(
            len(maker.buckets[0].sets["instance"]), seed=spec.seed, purpose="instance/item", indices=indices
        )
        assert set(items) == {0, 1, 2}


def test_d3_every_class_image_is_used(captioned: tuple[TrainingSpec, BatchFactory]) -> None:
    spec, maker = captioned
    num = len(maker.buckets[0].sets["class"])
    assert num > len(maker.buckets[0].sets["instance"])
    items = rng.choose_items(num, seed=spec.seed, purpose="class/item", indices=list(range(num)))
    assert sorted(items) == list(range(num))


@pytest.mark.parametrize(
    "noise",
    [
        GaussianDiffusion(DDPMScheduler(beta_schedule="scaled_linear")),
        GaussianDiffusion(DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")),
        RectifiedFlow(FlowMatchEulerDiscreteScheduler(shift=3.0)),
    ],
    ids=["d4-noise", "d4-velocity", "d5-flow"],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_d4_d5_every_instance_and_class_example_has_its_own_loss_weight(
    noise: GaussianDiffusion | RectifiedFlow, batch_size: int
) -> None:
    torch.manual_seed(0)
    timesteps = noise.sample_timesteps(torch.linspace(0.05, 0.95, 2 * batch_size))
    predicted, target = torch.randn(2 * batch_size, 4, 8, 8), torch.randn(2 * batch_size, 4, 8, 8)
    weights = min_snr_weights(noise, timesteps, snr_gamma=5.0)
    assert len(set(weights.tolist())) > 1
    loss = prior_preservation_loss(predicted, target, prior_loss_weight=0.7, weights=weights)
    each = [float(weights[i]) * float((predicted[i] - target[i]).square().mean()) for i in range(2 * batch_size)]
    instance, prior = sum(each[:batch_size]) / batch_size, sum(each[batch_size:]) / batch_size
    assert float(loss.instance) == pytest.approx(instance, rel=1e-5)
    assert loss.prior is not None
    assert float(loss.prior) == pytest.approx(prior, rel=1e-5)
    assert float(loss.total) == pytest.approx(instance + 0.7 * prior, rel=1e-5)


def test_d6_ranks_draw_different_noise_and_timesteps(captioned: tuple[TrainingSpec, BatchFactory]) -> None:
    spec, maker = captioned
    [first], [second] = (maker.make(indices_of(spec, rank=rank, world_size=2, num=4), CPU) for rank in range(2))
    assert not torch.equal(first.timesteps, second.timesteps)
    for mine in first.noise:
        assert not any(torch.equal(mine, theirs) for theirs in second.noise)


def test_d7_flips_and_crops_are_resampled_at_every_step(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = make_spec(tmp_path, tiny_model_folder, flip_probability=0.5, num_crop_variants=3)
    maker = BatchFactory(load_model(spec.diffusion), spec)
    assert maker.buckets[0].sets["instance"].mean.shape[1] == 6
    indices = list(range(180))
    items = rng.choose_items(3, seed=spec.seed, purpose="instance/item", indices=indices)
    variants = maker.choose_variants("instance", indices).tolist()
    for item in range(3):
        assert {v for i, v in zip(items, variants, strict=True) if i == item} == set(range(6))
