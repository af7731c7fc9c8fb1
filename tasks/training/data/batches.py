"""Batches drawn by counter: the same samples at the same step, whatever was run before."""

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
    """One forward: `[instance | class]` along dim 0; token ids stay on the CPU, the rest is on the device."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    time_ids: Tensor
    mask: Tensor
    input_ids: Tensor
    share: float = 1.0
    """This batch's part of its rank's samples; below 1 where they are of several sizes."""


@dataclass(frozen=True)
class StepBatch:
    """The samples of one training step of one rank: one forward per size among them."""

    indices: list[int]
    """Global sample indices."""
    forwards: list[TrainingBatch]


@dataclass(frozen=True)
class Bucket:
    """Instance images of one size, by their number among all, and the class images cut to it."""

    indices: list[int]
    sets: dict[str, LatentDataset]


class BatchFactory:
    """Builds the batches that a list of global sample indices stands for."""

    def __init__(self, model: DiffusionModel, spec: TrainingSpec) -> None:
        self.spec = spec
        self.noise_scheduler = model.noise_scheduler
        self.buckets = []
        for size, indices in spec.sort_into_buckets().items():
            sets = {
                "instance": load_latents(
                    model, spec, "instance", size=size, variants=[plan_crops(spec, i) for i in indices]
                )
            }
            if spec.training.prior_loss_weight > 0:
                sets["class"] = load_latents(
                    model, spec, "class", size=size, variants=[[CropFlip()]] * len(spec.class_images)
                )
            self.buckets.append(Bucket(indices, sets))
        self.holdout = [
            load_latents(model, spec, "holdout", size=size, variants=[[CropFlip()]] * len(indices))
            for size, indices in spec.sort_into_buckets("holdout").items()
        ]
        self.empty_ids = model.tokenize([""])[0]

    def make(self, indices: list[int], device: torch.device) -> list[TrainingBatch]:
        """Return one batch per size among the samples; the halves draw from streams of their own.

        A class image is cut to the size of the instance image beside it, so both share one forward.
        """
        chosen = self.choose_items("instance", len(self.spec.instance_images), indices)
        batches = []
        for bucket in self.buckets:
            pairs = [(i, bucket.indices.index(item)) for i, item in zip(indices, chosen, strict=True)
                     if item in bucket.indices]  # fmt: skip
            if pairs:
                rows, items = [i for i, _ in pairs], [item for _, item in pairs]
                batches.append(self.make_batch(bucket, rows, items, share=len(rows) / len(indices), device=device))
        return batches

    def make_batch(
        self, bucket: Bucket, indices: list[int], items: list[int], *, share: float, device: torch.device
    ) -> TrainingBatch:
        """Return the batch of samples that show instance images of one bucket."""
        halves = [self.make_half("instance", bucket.sets["instance"], indices, items=items)]
        if "class" in bucket.sets:
            others = bucket.sets["class"]
            halves.append(
                self.make_half("class", others, indices, items=self.choose_items("class", len(others), indices))
            )
        *columns, input_ids = [torch.cat(column) for column in zip(*halves, strict=True)]
        latents, noise, timesteps, time_ids, mask = (send(column, device) for column in columns)
        return TrainingBatch(latents, noise, timesteps, time_ids, mask, input_ids, share)

    def choose_items(self, kind: str, num: int, indices: list[int]) -> list[int]:
        """Return which picture each sample shows."""
        return rng.choose_items(num, seed=self.spec.seed, purpose=f"{kind}/item", indices=indices)

    def make_half(
        self, kind: str, images: LatentDataset, indices: list[int], *, items: list[int]
    ) -> tuple[Tensor, ...]:
        """Return latents, noise, timesteps, time_ids, mask and token ids of one half."""
        seed = self.spec.seed
        variants = self.choose_variants(kind, indices)
        shape = tuple(images.mean.shape[2:])
        posterior = rng.draw_normal(shape, seed=seed, purpose=f"{kind}/posterior", indices=indices)
        noise = rng.draw_normal(shape, seed=seed, purpose=f"{kind}/noise", indices=indices)
        uniform = rng.draw_uniform(seed=seed, purpose=f"{kind}/timestep", indices=indices)
        latents = images.mean[items, variants] + images.std[items, variants] * posterior
        input_ids = images.input_ids[items]
        if kind == "instance" and self.spec.training.proportion_empty_prompts > 0:
            share = self.spec.training.proportion_empty_prompts
            dropped = rng.draw_flags(share, seed=seed, purpose="instance/caption", indices=indices)
            input_ids = torch.where(dropped[:, None], self.empty_ids, input_ids)
        background = self.spec.training.background_loss_weight
        mask = background + (1 - background) * images.mask[items, variants]
        timesteps = self.noise_scheduler.sample_timesteps(uniform)
        return latents, noise, timesteps, images.time_ids[items, variants], mask, input_ids

    def choose_variants(self, kind: str, indices: list[int]) -> Tensor:
        """Return which variant of its picture each sample shows."""
        training, seed = self.spec.training, self.spec.seed
        num_crops = max(1, training.num_crop_variants)
        if kind != "instance":
            return torch.zeros(len(indices), dtype=torch.long)
        chosen = rng.draw_integers(num_crops, seed=seed, purpose="instance/crop", indices=indices)
        if training.flip_probability > 0:
            share = training.flip_probability
            chosen = chosen + num_crops * rng.draw_flags(share, seed=seed, purpose="instance/flip", indices=indices)
        return chosen


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to the device; from pinned memory, since a plain copy would wait for the step before."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
