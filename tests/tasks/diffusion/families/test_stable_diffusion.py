"""The Stable Diffusion adapter on a tiny model of the true architecture."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from tasks.diffusion.hub import identify_model
from tasks.diffusion.registry import load_model
from tasks.diffusion.types import SamplingRequest
from tasks.errors import ConfigError
from tests.support.tiny import make_tiny_stable_diffusion, tiny_diffusion_config

REQUESTS = [SamplingRequest("a photo of a fish", seed) for seed in range(4)]


def test_sampling_agrees_with_the_reference_pipeline(tiny_model_folder: Path) -> None:
    model = load_model(tiny_diffusion_config(tiny_model_folder, sampler="ddim"))
    ours = model.sample(REQUESTS[:1], num_inference_steps=4, guidance_scale=5.0)[0]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model_folder, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a photo of a fish", num_inference_steps=4, guidance_scale=5.0, height=32, width=32,
        latents=torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0)),
    ).images[0]  # fmt: skip
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert difference.max() <= 1


@pytest.mark.parametrize(
    "sampler",
    ["ddim", "dpm++", "euler", "UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"],
)
def test_an_image_depends_on_its_seed_not_on_its_batch(tiny_model_folder: Path, sampler: str) -> None:
    model = load_model(tiny_diffusion_config(tiny_model_folder, sampler=sampler))
    together = model.sample(REQUESTS, num_inference_steps=3, guidance_scale=3.0)
    alone = [model.sample([request], num_inference_steps=3, guidance_scale=3.0)[0] for request in REQUESTS]
    for first, second in zip(together, alone, strict=True):
        # Kernels may sum in another order for another batch size: at most the last level differs.
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1
    assert together[0].tobytes() != together[1].tobytes()


def test_velocity_is_the_target_of_a_v_prediction_model(tmp_path: Path) -> None:
    folder = make_tiny_stable_diffusion(tmp_path / "v", prediction_type="v_prediction")
    model = load_model(tiny_diffusion_config(folder))
    latents, noise = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    timesteps = torch.tensor([10, 900])
    noisy = model.noise_scheduler.add_noise(latents, noise, timesteps)
    velocity = model.noise_scheduler.compute_target(latents, noise, timesteps)
    signal = (model.noise_scheduler.compute_snr(timesteps) / (1 + model.noise_scheduler.compute_snr(timesteps))).view(
        -1, 1, 1, 1
    )
    torch.testing.assert_close(signal.sqrt() * noisy - (1 - signal).sqrt() * velocity, latents, rtol=1e-4, atol=1e-4)


def test_a_saved_model_samples_the_same_image(tmp_path: Path, tiny_model_folder: Path) -> None:
    config = tiny_diffusion_config(tiny_model_folder)
    model = load_model(config)
    model.save(tmp_path / "saved")
    again = load_model(config, folder=tmp_path / "saved")
    pictures = [m.sample(REQUESTS[:1], num_inference_steps=2, guidance_scale=2.0)[0] for m in (model, again)]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    reference = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert reference.unet.num_parameters() == model.components["unet"].num_parameters()
    assert not [p for p in (tmp_path / "saved").rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_trainable_modules_follow_train_text_encoder(tiny_model_folder: Path) -> None:
    model = load_model(tiny_diffusion_config(tiny_model_folder))
    assert set(model.trainable_modules(train_text_encoder=True)) == {"unet", "text_encoder"}
    assert set(model.trainable_modules(train_text_encoder=False)) == {"unet"}


def test_models_are_identified_by_their_content_hash(tmp_path: Path, tiny_model_folder: Path) -> None:
    config = tiny_diffusion_config(tiny_model_folder)
    copy = Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))
    assert identify_model(config).sha256 == identify_model(tiny_diffusion_config(copy)).sha256
    path = copy / "unet" / "config.json"
    path.write_text(path.read_text() + " ")
    assert identify_model(config).sha256 != identify_model(tiny_diffusion_config(copy)).sha256


def test_a_folder_without_a_complete_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model_index\.json"):
        load_model(tiny_diffusion_config(tmp_path))
    folder = make_tiny_stable_diffusion(tmp_path / "broken")
    next((folder / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="unet holds no weights"):
        load_model(tiny_diffusion_config(folder))
