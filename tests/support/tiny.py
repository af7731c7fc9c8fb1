"""Tiny real parts: a random Stable Diffusion, photos, a spec to train with."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.types import SamplingRequest
from tasks.mini.pretrain.tokens import write_tokenizer
from tasks.mini.world.scenes import draw_scene, sample_subject_scene
from tasks.stage.digests import digest_file, digest_folder
from tasks.training.config import TrainingConfig
from tasks.training.process.worker_spec import RunFolder, TrainingImage, TrainingSpec
from tests.support.config import make_config

SIDE = 32
DEVICE = os.environ.get("LIKENESS_TEST_DEVICE", "cpu")
"""Where tiny models train and sample; tests that compare with other code on the CPU fail on another."""
WORDS = ["a", "photo", "of", "fish", "in", "the", "snow", "on", "beach", "sks"]


def make_tiny_stable_diffusion(folder: Path, *, prediction_type: str = "epsilon") -> Path:
    """Write a diffusers folder of the true architecture: 50 thousand weights, 32 px."""
    torch.manual_seed(0)
    write_tokenizer(folder.parent / "tokenizer", WORDS)
    tokenizer = CLIPTokenizer.from_pretrained(folder.parent / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32,
        bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1, pad_token_id=len(tokenizer) - 1,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=SIDE,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_diffusion_config(folder: Path, **changes: Any) -> DiffusionConfig:
    """Return the configuration of a tiny model."""
    return make_config(
        DiffusionConfig,
        **{"pretrained_model_name_or_path": str(folder), "resolution": SIDE, "device": DEVICE, **changes},
    )


def draw_photos(folder: Path, *, num: int = 4, seed: int = 7, size: int = 128) -> list[Path]:
    """Write photos of one drawn subject as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(num):
        path = folder / f"photo-{index}.png"
        draw_photo(index, seed=seed, size=size).save(path)
        paths.append(path)
    return paths


def draw_photo(index: int = 0, *, seed: int = 7, size: int = 128) -> Image.Image:
    """Draw one photo of a subject."""
    return draw_scene(sample_subject_scene("fish", seed=seed, index=index), size=size)


def describe_image(path: Path, prompt: str = "", *, mask: Path | None = None) -> TrainingImage:
    """Return a picture as the training stage hands it to its worker."""
    with Image.open(path) as opened:
        width, height = opened.size
    masked = {"mask_path": str(mask), "mask_sha256": digest_file(mask)} if mask else {}
    return TrainingImage(
        path=str(path), width=width, height=height, sha256=digest_file(path), prompt=prompt, **masked
    )  # fmt: skip


def make_spec(tmp_path: Path, model_folder: Path, **changes: Any) -> TrainingSpec:
    """Return a spec that trains a tiny model on drawn photos in seconds."""
    settings = {
        "max_train_steps": 8, "train_batch_size": 2, "learning_rate": 1e-3, "checkpointing_steps": 2,
        "log_every_n_steps": 1, "num_threads": 1,
    }  # fmt: skip
    training = make_config(TrainingConfig, **{**settings, **changes})
    photos = draw_photos(tmp_path / "photos", num=3)
    others = draw_photos(tmp_path / "class", num=4, seed=11)

    def images(paths: list[Path], prompt: str) -> tuple[TrainingImage, ...]:
        return tuple(describe_image(path, prompt) for path in paths)

    return TrainingSpec(
        stage_key="test",
        folder=str(tmp_path / "run"),
        latent_folder=str(tmp_path / "latents"),
        model_folder=str(model_folder),
        base_model_sha256=digest_folder(model_folder),
        seed=5,
        identifier_token="sks",
        class_noun="fish",
        diffusion=tiny_diffusion_config(model_folder),
        training=training,
        instance_images=images(photos, "a photo of sks fish"),
        class_images=images(others, "a photo of a fish") if training.prior_loss_weight else (),
    )


def family_spec(tmp_path: Path, model_folder: Path, *, family: str, **changes: object) -> TrainingSpec:
    """Return a spec of three steps for a model of any family."""
    settings = {"max_train_steps": 3, "train_batch_size": 1, "checkpointing_steps": 2, **changes}
    spec = make_spec(tmp_path, model_folder, **settings)
    diffusion = spec.diffusion.model_copy(update={"family": family, "sampler": "ddim"})
    return spec.model_copy(update={"diffusion": diffusion})


def train_here(folder: Path, model_folder: Path, *, spec: TrainingSpec | None = None, **changes: Any) -> RunFolder:
    """Train a tiny model in this process and return the run's folder."""
    from tasks.training.process import worker  # Lightning takes seconds to import

    spec = spec or make_spec(folder, model_folder, **changes)
    spec.path.mkdir(parents=True, exist_ok=True)
    run = RunFolder(spec.path)
    run.events.write_text("")
    assert worker.train(spec) == 0
    return run


def read_unet(run: RunFolder) -> dict[str, torch.Tensor]:
    """Return the tuned UNet's weights."""
    return load_file(run.model / "unet" / "diffusion_pytorch_model.safetensors")


class CountingModel:
    """A model that remembers how many images each call drew."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self.sizes: list[int] = []

    def sample(self, requests: Sequence[SamplingRequest], **options: Any) -> list[Image.Image]:
        self.sizes.append(len(requests))
        return self.model.sample(list(requests), **options)
