"""Training data in memory: the VAE's posterior of every picture, and batches drawn by counter.

The posterior (mean and deviation) is cached per picture and mirroring and sampled anew at every
step, so the cache gives what encoding pixels at every step would.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import IterableDataset

from tasks.diffusion.base import DiffusionModel
from tasks.errors import ArtifactCorrupt
from tasks.training import draws
from tasks.training.spec import TrainingImage, TrainingSpec

ENCODE_BATCH = 8


@dataclass(frozen=True)
class ImageSet:
    """Cached posteriors `(N, 2, C, h, w)` (plain, mirrored) and token ids `(N, L)`."""

    mean: Tensor
    std: Tensor
    input_ids: Tensor

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class TrainingBatch:
    """One forward: `[instance | class]` along dim 0."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    input_ids: Tensor


class SampleCounter(IterableDataset[Tensor]):
    """Yields the global sample indices of one rank's batches, from a given optimizer step on."""

    def __init__(self, spec: TrainingSpec, *, start_step: int, rank: int, world_size: int) -> None:
        super().__init__()
        self.batch_size = spec.training.train_batch_size
        self.stride = world_size * self.batch_size
        self.start = start_step * spec.training.gradient_accumulation_steps * self.stride
        self.offset = rank * self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        first = self.start + self.offset
        while True:
            yield torch.arange(first, first + self.batch_size)
            first += self.stride


def load_pixel_values(path: Path, *, resolution: int, sha256: str) -> Tensor:
    """Return a picture as `(3, H, W)` in [-1, 1], cropped at its centre, its aspect kept.

    Raises:
        ArtifactCorrupt: the file isn't the one that was inspected.

    """
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtifactCorrupt(f"{path} changed after it was checked; run again to fetch it anew")
    with Image.open(path) as opened:
        image = ImageOps.fit(opened.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS)
    array = torch.from_numpy(np.asarray(image).copy())
    return array.permute(2, 0, 1).float() / 127.5 - 1.0


def encode_set(
    model: DiffusionModel, images: tuple[TrainingImage, ...], *, resolution: int, is_mirrored: bool
) -> ImageSet:
    """Return the cached posteriors of a set of pictures."""
    means, stds = [], []
    for start in range(0, len(images), ENCODE_BATCH):
        pixels = torch.stack(
            [
                load_pixel_values(Path(image.path), resolution=resolution, sha256=image.sha256)
                for image in images[start : start + ENCODE_BATCH]
            ]
        )
        variants = [model.encode_images(pixels)]
        if is_mirrored:
            variants.append(model.encode_images(pixels.flip(-1)))
        means.append(torch.stack([v.mean.float().cpu() for v in variants], 1))
        stds.append(torch.stack([v.std.float().cpu() for v in variants], 1))
    input_ids = model.tokenize([image.prompt for image in images])
    return ImageSet(torch.cat(means), torch.cat(stds), input_ids)


class BatchMaker:
    """Builds the batch that a list of global sample indices stands for."""

    def __init__(self, model: DiffusionModel, spec: TrainingSpec) -> None:
        self.spec = spec
        self.num_train_timesteps = model.num_train_timesteps
        resolution = spec.diffusion.resolution
        flips = spec.training.flip_probability > 0
        self.sets = {"instance": encode_set(model, spec.instance_images, resolution=resolution, is_mirrored=flips)}
        if spec.training.prior_loss_weight > 0:
            self.sets["class"] = encode_set(model, spec.class_images, resolution=resolution, is_mirrored=False)

    def make(self, indices: list[int], device: torch.device) -> TrainingBatch:
        """Return the batch; the halves have draws of their own."""
        halves = [self.make_half(kind, indices) for kind in self.sets]
        columns = [torch.cat(column).to(device) for column in zip(*halves, strict=True)]
        return TrainingBatch(*columns)

    def make_half(self, kind: str, indices: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return latents, noise, timesteps and token ids of one half."""
        images, seed = self.sets[kind], self.spec.seed
        items = draws.choose_items(len(images), seed=seed, purpose=f"{kind}/item", indices=indices)
        variants = torch.zeros(len(indices), dtype=torch.long)
        if kind == "instance" and self.spec.training.flip_probability > 0:
            probability = self.spec.training.flip_probability
            flags = draws.draw_flags(probability, seed=seed, purpose="instance/flip", indices=indices)
            variants = flags.long()
        shape = tuple(images.mean.shape[2:])
        posterior = draws.draw_normal(shape, seed=seed, purpose=f"{kind}/posterior", indices=indices)
        noise = draws.draw_normal(shape, seed=seed, purpose=f"{kind}/noise", indices=indices)
        timesteps = draws.draw_integers(
            self.num_train_timesteps, seed=seed, purpose=f"{kind}/timestep", indices=indices
        )
        latents = images.mean[items, variants] + images.std[items, variants] * posterior
        return latents, noise, timesteps, images.input_ids[items]
