"""Cached VAE posteriors: every image variant is encoded once."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tasks.diffusion.adapter import DiffusionModel
from tasks.stage.files import write_atomic
from tasks.stage.tensor_files import save_tensors
from tasks.training.data.buckets import Size
from tasks.training.data.latent_cache import digest_path_of, format_checksum, is_valid
from tasks.training.data.preprocessing import CropFlip, check_digest, preprocess_image
from tasks.training.process.worker_spec import TrainingImage, TrainingSpec

ENCODE_BATCH = 8


@dataclass(frozen=True)
class LatentDataset:
    """Cached posteriors of N images in V variants; a row's posterior and prompt share one index.

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


def load_latents(
    model: DiffusionModel, spec: TrainingSpec, kind: str, *, size: Size, variants: list[list[CropFlip]]
) -> LatentDataset:
    """Return the posteriors of one image set in a size: read from the cache file, else encoded and written to it.

    Raises:
        ArtifactCorrupt: an image differs from its digest in the spec.

    """
    images = spec.images_of(kind, size)
    path = spec.latents_path(kind, size)
    if not is_valid(path):
        encoded = encode_latents(model, images, size=size, variants=variants)
        if int(os.environ.get("RANK", "0")) > 0:
            return encoded  # rank 0 writes; no barrier, since the others have their own copy
        # The digest is removed first and written last: a crash between leaves a file that does not verify.
        digest_path_of(path).unlink(missing_ok=True)
        save_tensors(
            {"mean": encoded.mean, "std": encoded.std, "mask": encoded.mask, "time_ids": encoded.time_ids}, path
        )
        write_atomic(digest_path_of(path), format_checksum(path))
    # A cache hit reads no image, yet a changed file must fail as it would without the cache.
    for image in images:
        check_digest(Path(image.path), image.sha256)
    # Token ids are not cached: latents are keyed by pixels, so that other captions reuse them.
    return LatentDataset(**load_file(path), input_ids=tokenize_prompts(model, images))


def encode_latents(
    model: DiffusionModel, images: tuple[TrainingImage, ...], *, size: Size, variants: list[list[CropFlip]]
) -> LatentDataset:
    """Encode a set of images; each has a list of variants, all of equal length."""
    jobs = [(image, variant) for image, row in zip(images, variants, strict=True) for variant in row]
    means, stds, masks, time_ids = [], [], [], []
    batch_size = ENCODE_BATCH if size.width * size.height <= 512**2 else 1  # the VAE's own activations are large
    for start in range(0, len(jobs), batch_size):
        loaded = [
            preprocess_image(image, size=size, variant=variant) for image, variant in jobs[start : start + batch_size]
        ]
        posterior = model.encode_images(torch.stack([one.pixels for one in loaded]))
        means.append(posterior.mean.float().cpu().contiguous())
        stds.append(posterior.std.float().cpu().contiguous())
        grid = posterior.mean.shape[-2:]
        # (n, 1, H, W) -> (n, 1, h, w): each latent position gets the mean opacity of its pixels.
        masks.append(F.interpolate(torch.stack([one.mask for one in loaded]), grid, mode="area"))
        time_ids += [one.time_ids for one in loaded]
    # (N * V, ...) -> (N, V, ...); `jobs` has the variants of an image in a row.
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
