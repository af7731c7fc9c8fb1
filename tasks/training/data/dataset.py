"""Training data in memory: the VAE's posterior of every picture, and batches drawn by counter.

The posterior (mean and deviation) is cached per picture and variant (crop, mirroring) and sampled anew
at every step, so the cache gives what encoding the same pixels at every step would.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import IterableDataset

from tasks.diffusion.adapter import DiffusionModel
from tasks.errors import ArtifactCorrupt
from tasks.stage.files import write_atomic
from tasks.stage.tensor_files import save_tensors
from tasks.training.data import rng
from tasks.training.data.buckets import Size
from tasks.training.data.latent_cache import is_whole, make_note, note_of
from tasks.training.process.worker_spec import TrainingImage, TrainingSpec

ENCODE_BATCH = 8


@dataclass(frozen=True)
class LatentDataset:
    """Cached posteriors of N pictures in V variants: a row's picture and prompt share one index.

    `mean` and `std` are `(N, V, C, h, w)`, `mask` `(N, V, 1, h, w)` in [0, 1], `time_ids` `(N, V, 6)`,
    `input_ids` `(N, L)`.
    """

    mean: Tensor
    std: Tensor
    mask: Tensor
    time_ids: Tensor
    input_ids: Tensor

    def __len__(self) -> int:
        return len(self.mean)


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
    """This batch's part of its rank's samples; below 1 where they are of several time_ids."""


@dataclass(frozen=True)
class CropFlip:
    """How a picture is cut: the crop's place in the free room `[0, 1]`, and mirroring.

    Without a place the crop lies around the subject where a mask or the inspector says where that is,
    else in the middle.
    """

    left: float | None = None
    top: float | None = None
    is_flipped: bool = False


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


@dataclass(frozen=True)
class PreprocessedImage:
    """A picture cut to size: pixels `(3, H, W)` in [-1, 1], mask `(1, H, W)` in [0, 1], six time_ids.

    The time_ids are original height and width, top and left of the crop, and its height and width, in pixels
    (those of Stable Diffusion XL, arXiv 2307.01952).
    """

    pixels: Tensor
    mask: Tensor
    time_ids: list[int]


def load_picture(image: TrainingImage, *, size: Size, variant: CropFlip = CropFlip()) -> PreprocessedImage:
    """Scale a picture until it covers the size, its aspect kept, and crop what is over.

    Raises:
        ArtifactCorrupt: the file isn't the one that was inspected.

    """
    with Image.open(io.BytesIO(check_digest(Path(image.path), image.sha256))) as opened:
        picture = opened.convert("RGB")
    mask = Image.new("L", picture.size, 255)
    if image.mask_path:
        with Image.open(io.BytesIO(check_digest(Path(image.mask_path), image.mask_sha256))) as opened:
            mask = opened.convert("L")
    factor = max(size.width / picture.width, size.height / picture.height)
    width, height = max(size.width, round(picture.width * factor)), max(size.height, round(picture.height * factor))
    focus = find_focus(image, mask)
    left = place_crop(variant.left, width, size.width, focus=focus[0])
    top = place_crop(variant.top, height, size.height, focus=focus[1])
    crop = (left, top, left + size.width, top + size.height)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0).crop(crop)
    mask = mask.resize((width, height), Image.Resampling.BOX).crop(crop)
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1.0
    opacity = torch.from_numpy(np.asarray(mask).copy())[None].float() / 255
    if variant.is_flipped:
        pixels, opacity, left = pixels.flip(-1), opacity.flip(-1), width - size.width - left
    return PreprocessedImage(pixels, opacity, [*image.original_size(), top, left, size.height, size.width])


def find_focus(image: TrainingImage, mask: Image.Image) -> tuple[float, float]:
    """Return what a crop should lie around, in shares of width and height."""
    if image.focus is not None and not image.mask_path:
        return image.focus
    box = mask.point(lambda value: 255 * (value > 127)).getbbox() or (0, 0, *mask.size)
    return (box[0] + box[2]) / 2 / mask.width, (box[1] + box[3]) / 2 / mask.height


def place_crop(share: float | None, length: int, side: int, *, focus: float) -> int:
    """Return where a crop begins: at a share of the free room, or around a point of the picture."""
    free = length - side
    if share is not None:
        return round(free * share)
    return min(free, max(0, round(focus * length - side / 2)))


def plan_variants(spec: TrainingSpec, index: int) -> list[CropFlip]:
    """Return the variants of an instance image; random crops are a function of seed, image and number."""
    num = spec.training.num_crop_variants
    if num == 0:
        places: list[tuple[float | None, float | None]] = [(None, None)]
    else:
        rows = [index * num + i for i in range(num)]
        left = rng.draw_uniform(seed=spec.seed, purpose="instance/crop-left", indices=rows)
        top = rng.draw_uniform(seed=spec.seed, purpose="instance/crop-top", indices=rows)
        places = list(zip(left.tolist(), top.tolist(), strict=True))
    mirrorings = (False, True) if spec.training.flip_probability > 0 else (False,)
    return [CropFlip(left, top, is_flipped) for is_flipped in mirrorings for left, top in places]


def load_set(
    model: DiffusionModel, spec: TrainingSpec, kind: str, size: Size, variants: list[list[CropFlip]]
) -> LatentDataset:
    """Return one half's posteriors in a size: mapped from disk where they were made before, else encoded and kept."""
    images = spec.images_of(kind, size)
    path = spec.latents_path(kind, size)
    if not is_whole(path):
        encoded = encode_set(model, images, size=size, variants=variants)
        if int(os.environ.get("RANK", "0")) > 0:
            return encoded  # the first rank writes; the others need not wait for it
        note_of(path).unlink(missing_ok=True)
        save_tensors(
            {"mean": encoded.mean, "std": encoded.std, "mask": encoded.mask, "time_ids": encoded.time_ids}, path
        )
        write_atomic(note_of(path), make_note(path))
    for image in images:
        check_digest(Path(image.path), image.sha256)
    return LatentDataset(**load_file(path), input_ids=tokenize_prompts(model, images))


def check_digest(path: Path, sha256: str) -> bytes:
    """Return a file's bytes. Raises ArtifactCorrupt if it isn't the one that was inspected."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtifactCorrupt(f"{path} changed after it was checked; run again to fetch it anew")
    return data


def encode_set(
    model: DiffusionModel, images: tuple[TrainingImage, ...], *, size: Size, variants: list[list[CropFlip]]
) -> LatentDataset:
    """Return the posteriors of a set of pictures, one list of variants each."""
    jobs = [(image, variant) for image, row in zip(images, variants, strict=True) for variant in row]
    means, stds, masks, time_ids = [], [], [], []
    batch_size = ENCODE_BATCH if size.width * size.height <= 512**2 else 1  # the VAE's own activations are large
    for start in range(0, len(jobs), batch_size):
        loaded = [
            load_picture(image, size=size, variant=variant) for image, variant in jobs[start : start + batch_size]
        ]
        posterior = model.encode_images(torch.stack([one.pixels for one in loaded]))
        means.append(posterior.mean.float().cpu().contiguous())
        stds.append(posterior.std.float().cpu().contiguous())
        grid = posterior.mean.shape[-2:]
        masks.append(F.interpolate(torch.stack([one.mask for one in loaded]), grid, mode="area"))
        time_ids += [one.time_ids for one in loaded]
    num = len(images)
    mean, std, mask = torch.cat(means), torch.cat(stds), torch.cat(masks)
    return LatentDataset(
        mean=mean.view(num, -1, *mean.shape[1:]),
        std=std.view(num, -1, *std.shape[1:]),
        mask=mask.view(num, -1, *mask.shape[1:]),
        time_ids=torch.tensor(time_ids, dtype=torch.float32).view(num, -1, 6),
        input_ids=tokenize_prompts(model, images),
    )


def tokenize_prompts(model: DiffusionModel, images: tuple[TrainingImage, ...]) -> Tensor:
    """Return the ids `(N, L)` of the images' prompts."""
    return model.tokenize([image.prompt for image in images])


@dataclass(frozen=True)
class Bucket:
    """Instance images of one size, by their number among all, and the class images cut to it."""

    indices: list[int]
    sets: dict[str, LatentDataset]


class BatchMaker:
    """Builds the batches that a list of global sample indices stands for."""

    def __init__(self, model: DiffusionModel, spec: TrainingSpec) -> None:
        self.spec = spec
        self.noise_scheduler = model.noise_scheduler
        self.buckets = []
        for size, indices in spec.sort_into_buckets().items():
            sets = {"instance": load_set(model, spec, "instance", size, [plan_variants(spec, i) for i in indices])}
            if spec.training.prior_loss_weight > 0:
                sets["class"] = load_set(model, spec, "class", size, [[CropFlip()]] * len(spec.class_images))
            self.buckets.append(Bucket(indices, sets))
        self.holdout = [
            load_set(model, spec, "holdout", size, [[CropFlip()]] * len(indices))
            for size, indices in spec.sort_into_buckets("holdout").items()
        ]
        self.empty_ids = model.tokenize([""])[0]

    def make(self, indices: list[int], device: torch.device) -> list[TrainingBatch]:
        """Return one batch per size among the samples; the halves have rng of their own.

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
        halves = [self.make_half("instance", bucket.sets["instance"], indices, items)]
        if "class" in bucket.sets:
            others = bucket.sets["class"]
            halves.append(self.make_half("class", others, indices, self.choose_items("class", len(others), indices)))
        *columns, input_ids = [torch.cat(column) for column in zip(*halves, strict=True)]
        latents, noise, timesteps, time_ids, mask = (send(column, device) for column in columns)
        return TrainingBatch(latents, noise, timesteps, time_ids, mask, input_ids, share)

    def choose_items(self, kind: str, num: int, indices: list[int]) -> list[int]:
        """Return which picture each sample shows."""
        return rng.choose_items(num, seed=self.spec.seed, purpose=f"{kind}/item", indices=indices)

    def make_half(self, kind: str, images: LatentDataset, indices: list[int], items: list[int]) -> tuple[Tensor, ...]:
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
