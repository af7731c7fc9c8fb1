"""Batches as a function of global sample indices: the same samples at the same step after any resume."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.diffusion.adapter import DiffusionModel
from tasks.training.data import rng
from tasks.training.data.latents import LatentDataset, load_latents
from tasks.training.data.preprocessing import CropFlip, plan_crops
from tasks.training.process.worker_spec import TrainingSpec


@dataclass(frozen=True)
class TrainingBatch:
    """One forward of 2B samples, `[instance | class]` along dim 0.

    `latents` and `noise` `(2B, C, h, w)`, `timesteps` `(2B,)`, `time_ids` `(2B, 6)`, `input_ids` `(2B, L)`, and `mask`
    `(2B, 1, h, w)`, loss weights in [0, 1]. Token ids are on the CPU, all else on the device.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    time_ids: Tensor
    mask: Tensor
    input_ids: Tensor
    sample_fraction: float = 1.0
    """This batch's part of its rank's samples; below 1 where they are of several sizes."""


@dataclass(frozen=True)
class StepBatch:
    """One micro-batch of one rank: one forward per aspect-ratio bucket among its samples."""

    indices: list[int]
    """Global sample indices."""
    forwards: list[TrainingBatch]


@dataclass(frozen=True)
class Bucket:
    """Instance images of one size, with their indices among all, and all class images cropped to it."""

    indices: list[int]
    sets: dict[str, LatentDataset]


class BatchFactory:
    """Maps global sample indices to batches."""

    def __init__(self, model: DiffusionModel, spec: TrainingSpec) -> None:
        self.spec = spec
        self.noise_scheduler = model.noise_scheduler
        self.buckets = []
        for size, indices in spec.assign_buckets().items():
            sets = {
                "instance": load_latents(
                    model, spec, "instance", size=size, variants=[plan_crops(spec, i) for i in indices]
                )
            }
            # Class and held-out images have one variant each: centered and unflipped.
            if spec.training.prior_loss_weight > 0:
                sets["class"] = load_latents(
                    model, spec, "class", size=size, variants=[[CropFlip()]] * len(spec.class_images)
                )
            self.buckets.append(Bucket(indices, sets))
        self.holdout = [
            load_latents(model, spec, "holdout", size=size, variants=[[CropFlip()]] * len(indices))
            for size, indices in spec.assign_buckets("holdout").items()
        ]
        self.empty_ids = model.tokenize([""])[0]  # (L,)

    def make(self, indices: list[int], device: torch.device) -> list[TrainingBatch]:
        """Return one batch per bucket among the samples; instance and class halves use separate random streams.

        A class image is cropped to the bucket of its paired instance image, so both share one forward.
        """
        # Over all instance images, whatever their buckets.
        chosen = self.choose_items("instance", len(self.spec.instance_images), indices)
        batches = []
        for bucket in self.buckets:
            # (global sample index, row of its image within the bucket)
            pairs = [(i, bucket.indices.index(item)) for i, item in zip(indices, chosen, strict=True)
                     if item in bucket.indices]  # fmt: skip
            if pairs:
                rows, items = [i for i, _ in pairs], [item for _, item in pairs]
                batches.append(
                    self.make_batch(bucket, rows, items, sample_fraction=len(rows) / len(indices), device=device)
                )
        return batches

    def make_batch(
        self, bucket: Bucket, indices: list[int], items: list[int], *, sample_fraction: float, device: torch.device
    ) -> TrainingBatch:
        """Return the batch of the samples whose instance images are in one bucket.

        `items` are rows of the bucket's instance images, `sample_fraction` the batch's part of the rank's samples.
        """
        halves = [self.make_half("instance", bucket.sets["instance"], indices, items=items)]
        if "class" in bucket.sets:
            others = bucket.sets["class"]
            halves.append(
                self.make_half("class", others, indices, items=self.choose_items("class", len(others), indices))
            )
        # Token ids stay on the CPU, where `encode_unique` finds the distinct prompts.
        *columns, input_ids = [torch.cat(column) for column in zip(*halves, strict=True)]
        latents, noise, timesteps, time_ids, mask = (send(column, device) for column in columns)
        return TrainingBatch(latents, noise, timesteps, time_ids, mask, input_ids, sample_fraction)

    def choose_items(self, kind: str, num: int, indices: list[int]) -> list[int]:
        """Return the image index of each sample."""
        return rng.choose_items(num, seed=self.spec.seed, purpose=f"{kind}/item", indices=indices)

    def make_half(
        self, kind: str, images: LatentDataset, indices: list[int], *, items: list[int]
    ) -> tuple[Tensor, ...]:
        """Return latents, noise, timesteps, time_ids, mask and token ids of one half."""
        seed = self.spec.seed
        variants = self.choose_variants(kind, indices)
        # (C, h, w) of the (N, V, C, h, w) cache.
        shape = tuple(images.mean.shape[2:])
        posterior = rng.draw_normal(shape, seed=seed, purpose=f"{kind}/posterior", indices=indices)
        noise = rng.draw_normal(shape, seed=seed, purpose=f"{kind}/noise", indices=indices)
        uniform = rng.draw_uniform(seed=seed, purpose=f"{kind}/timestep", indices=indices)
        # A new sample of the VAE posterior at every step, from cached moments; both are already scaled.
        # Paired indexing: (N, V, C, h, w) -> (B, C, h, w).
        latents = images.mean[items, variants] + images.std[items, variants] * posterior
        input_ids = images.input_ids[items]
        if kind == "instance" and self.spec.training.proportion_empty_prompts > 0:
            probability = self.spec.training.proportion_empty_prompts
            dropped = rng.draw_flags(probability, seed=seed, purpose="instance/caption", indices=indices)
            input_ids = torch.where(dropped[:, None], self.empty_ids, input_ids)  # (B, 1), (L,), (B, L)
        background = self.spec.training.background_loss_weight
        # Map opacity 0..1 to loss weights background..1.
        mask = background + (1 - background) * images.mask[items, variants]
        # A timestep depends on its sample alone, so batch size and ranks don't change it.
        timesteps = self.noise_scheduler.sample_timesteps(uniform)
        return latents, noise, timesteps, images.time_ids[items, variants], mask, input_ids

    def choose_variants(self, kind: str, indices: list[int]) -> Tensor:
        """Return the crop/flip variant of each sample: an index into `plan_crops`, `flipped * num_crops + crop`."""
        training, seed = self.spec.training, self.spec.seed
        num_crops = max(1, training.num_crop_variants)
        if kind != "instance":
            return torch.zeros(len(indices), dtype=torch.long)
        chosen = rng.draw_integers(num_crops, seed=seed, purpose="instance/crop", indices=indices)
        if training.flip_probability > 0:
            probability = training.flip_probability
            chosen = chosen + num_crops * rng.draw_flags(
                probability, seed=seed, purpose="instance/flip", indices=indices
            )
        return chosen


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to the device; from pinned memory, as a pageable copy would synchronize with the previous step."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
