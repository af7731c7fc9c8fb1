"""A loss without chance in it, when it has settled, and samples of the weights as they are."""

import json
from statistics import pvariance

import torch
from PIL import Image
from torch import Tensor

from tasks.diffusion.types import SamplingRequest
from tasks.prompts import write_subject_prompt
from tasks.training.config import ValidationSettings
from tasks.training.data import rng
from tasks.training.module import DreamBoothModule

MAX_PHOTOS = 8
NOISE_SHARES = (0.1, 0.35, 0.6, 0.85)
SAMPLE_SEED, SAMPLE_GUIDANCE, SAMPLES_PER_PROMPT = 7, 3.0, 2


@torch.no_grad()
def compute_validation_loss(module: DreamBoothModule) -> Tensor:
    """Return the mean error on fixed photos, noise and timesteps: a scalar that depends on weights alone.

    The photos are those held out of training, where there are some.
    """
    model = module.model
    rows = [(index, bucket.sets["instance"], row)
            for bucket in module.batches.buckets for row, index in enumerate(bucket.indices)]  # fmt: skip
    if module.batches.holdout:
        held = [(images, row) for images in module.batches.holdout for row in range(len(images))]
        rows = [(index, images, row) for index, (images, row) in enumerate(held)]
    was_training = [part.training for part in module.trained.values()]
    module.trained.eval()
    losses = []
    for index, images, row in sorted(rows, key=lambda told: told[0])[:MAX_PHOTOS]:  # one by one: memory is full
        told = model.encode_prompts(images.input_ids[row : row + 1])
        shape = tuple(images.mean.shape[2:])
        eps = rng.draw_normal(shape, seed=0, purpose="validation", indices=[index]).to(module.device)
        latents, time_ids = images.mean[row, :1].to(module.device), images.time_ids[row, :1].to(module.device)
        for share in NOISE_SHARES:
            timesteps = model.noise_scheduler.sample_timesteps(torch.tensor([share], dtype=torch.float64)).to(
                module.device
            )
            noisy = model.noise_scheduler.add_noise(latents, eps, timesteps)
            target = model.noise_scheduler.compute_target(latents, eps, timesteps)
            losses.append(
                (model.predict(module.fit_dtype(noisy), timesteps, told, time_ids).float() - target).square().mean()
            )
    for part, mode in zip(module.trained.values(), was_training, strict=True):
        part.train(mode)
    return torch.stack(losses).mean()


def read_validations(losses: list[str]) -> list[tuple[int, float]]:
    """Return (step, validation loss) of the rows of a loss log that have one."""
    rows = [json.loads(line) for line in losses if "validation_loss" in line]
    return [(row["step"], row["validation_loss"]) for row in rows if row["validation_loss"] is not None]


def has_converged(losses: list[str], settings: ValidationSettings) -> bool:
    """Say whether the validation loss varies little of late, against all its course (arXiv 2302.04841)."""
    values = [value for _, value in read_validations(losses)]
    if len(values) < 2 * settings.window:
        return False
    total = pvariance(values)
    return total == 0 or pvariance(values[-settings.window :]) / total < settings.threshold


def draw_samples(module: DreamBoothModule) -> list[list[Image.Image]]:
    """Draw a row of samples per prompt with the weights as they are; nothing is loaded again."""
    spec = module.spec
    words = {"identifier_token": spec.identifier_token, "class_noun": spec.class_noun}
    was_training = [part.training for part in module.trained.values()]
    module.trained.eval()
    vae_device = module.model.vae.device
    module.model.vae.to(module.device)
    rows = []
    validation = spec.training.validation
    for template in validation.sample_prompts:  # one by one: memory is full of training
        prompt = write_subject_prompt(template, **words)
        requests = [SamplingRequest(prompt, SAMPLE_SEED + i) for i in range(SAMPLES_PER_PROMPT)]
        num_steps = validation.sample_num_inference_steps
        rows.append(module.model.sample(requests, num_inference_steps=num_steps, guidance_scale=SAMPLE_GUIDANCE))
    module.model.vae.to(vae_device)
    for part, mode in zip(module.trained.values(), was_training, strict=True):
        part.train(mode)
    return rows


def join_grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Return rows of equally large pictures as one."""
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            grid.paste(picture, (width * x, height * y))
    return grid
