"""A loss without chance in it, the choice of weights by it, and when it has settled."""

import json
import shutil
from statistics import pvariance

import torch
from PIL import Image
from torch import Tensor

from tasks.diffusion.base import SamplingRequest
from tasks.training import draws
from tasks.training.checkpoints import TrainingState, copy_to_cpu, list_checkpoints, load_checkpoint, save_checkpoint
from tasks.training.config import ValidationSettings
from tasks.training.module import DreamBoothModule
from tasks.training.spec import RunFolder

MAX_PHOTOS = 8
NOISE_SHARES = (0.1, 0.35, 0.6, 0.85)
SAMPLE_SEED, SAMPLE_STEPS, SAMPLE_GUIDANCE, SAMPLES_PER_PROMPT = 7, 20, 3.0, 2
ALL = 1_000_000_000


@torch.no_grad()
def compute_validation_loss(module: DreamBoothModule) -> Tensor:
    """Return the mean error on fixed photos, noise and timesteps: a scalar that depends on weights alone."""
    model = module.model
    rows = [(index, bucket.sets["instance"], row)
            for bucket in module.batches.buckets for row, index in enumerate(bucket.indices)]  # fmt: skip
    was_training = [part.training for part in module.trained.values()]
    module.trained.eval()
    losses = []
    for index, images, row in sorted(rows, key=lambda told: told[0])[:MAX_PHOTOS]:  # one by one: memory is full
        told = model.encode_prompts(images.input_ids[row : row + 1])
        shape = tuple(images.mean.shape[2:])
        eps = draws.draw_normal(shape, seed=0, purpose="validation", indices=[index]).to(module.device)
        latents, sizes = images.mean[row, :1].to(module.device), images.sizes[row, :1].to(module.device)
        for share in NOISE_SHARES:
            timesteps = model.noise.choose_timesteps(torch.tensor([share], dtype=torch.float64)).to(module.device)
            noisy = model.noise.add_noise(latents, eps, timesteps)
            target = model.noise.compute_target(latents, eps, timesteps)
            losses.append(
                (model.predict(module.fit_dtype(noisy), timesteps, told, sizes).float() - target).square().mean()
            )
    for part, mode in zip(module.trained.values(), was_training, strict=True):
        part.train(mode)
    return torch.stack(losses).mean()


def read_validations(losses: list[str]) -> list[tuple[int, float]]:
    """Return (step, validation loss) of the rows of a loss log that have one."""
    rows = [json.loads(line) for line in losses if "validation_loss" in line]
    return [(row["step"], row["validation_loss"]) for row in rows if row["validation_loss"] is not None]


def has_settled(losses: list[str], settings: ValidationSettings) -> bool:
    """Say whether the validation loss varies little of late, against all its course (arXiv 2302.04841)."""
    values = [value for _, value in read_validations(losses)]
    if len(values) < 2 * settings.window:
        return False
    total = pvariance(values)
    return total == 0 or pvariance(values[-settings.window :]) / total < settings.threshold


def keep_best(run: RunFolder, module: DreamBoothModule, losses: list[str], *, identity: dict[str, str]) -> None:
    """Save what is trained if its validation loss is the lowest yet."""
    validations = read_validations(losses)
    if not validations or validations[-1][0] != json.loads(losses[-1])["step"]:
        return  # this one isn't finite
    step, value = validations[-1]
    if any(other <= value for _, other in validations[:-1]):
        return
    values = module.average or dict(module.named_trained())
    state = TrainingState(step, {name: copy_to_cpu(v) for name, v in values.items()}, {}, {}, [])
    save_checkpoint(run.best, state, identity=identity, num_kept=ALL)
    for path in list_checkpoints(run.best):
        if int(path.name.removeprefix("step-")) < step:
            shutil.rmtree(path)


@torch.no_grad()
def take_best(run: RunFolder, module: DreamBoothModule, losses: list[str], *, identity: dict[str, str]) -> int:
    """Put the weights of the lowest validation loss that are kept in place and return their step."""
    kept = {int(path.name.removeprefix("step-")) for path in list_checkpoints(run.best)}
    step, _ = min((v for v in read_validations(losses) if v[0] in kept), key=lambda pair: (pair[1], pair[0]))
    state = load_checkpoint(run.best / f"step-{step:08d}", identity=identity)
    for name, parameter in module.named_trained():
        parameter.copy_(state.weights[name])
    return step


def draw_grid(module: DreamBoothModule, prompts: list[str]) -> Image.Image:
    """Draw a row of samples per prompt with the weights as they are; nothing is loaded again."""
    was_training = [part.training for part in module.trained.values()]
    module.trained.eval()
    vae_device = module.model.vae.device
    module.model.vae.to(module.device)
    pictures = []
    for prompt in prompts:  # one by one: memory is full of training
        requests = [SamplingRequest(prompt, SAMPLE_SEED + i) for i in range(SAMPLES_PER_PROMPT)]
        pictures += module.model.sample(requests, num_inference_steps=SAMPLE_STEPS, guidance_scale=SAMPLE_GUIDANCE)
    module.model.vae.to(vae_device)
    for part, mode in zip(module.trained.values(), was_training, strict=True):
        part.train(mode)
    side = pictures[0].width
    grid = Image.new("RGB", (side * SAMPLES_PER_PROMPT, side * len(prompts)))
    for i, picture in enumerate(pictures):
        grid.paste(picture, (side * (i % SAMPLES_PER_PROMPT), side * (i // SAMPLES_PER_PROMPT)))
    return grid
