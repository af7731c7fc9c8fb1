"""Preprocess image files to the training size: scale, crop and flip, together with the mask."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tasks.errors import ArtifactCorrupt
from tasks.training.data import rng
from tasks.training.data.buckets import Size
from tasks.training.process.worker_spec import TrainingImage, TrainingSpec

Box = tuple[float, float, float, float]
"""Left, top, right and bottom as fractions of width and height."""


@dataclass(frozen=True)
class CropFlip:
    """Crop position, as a fraction [0, 1] of the slack between scaled image and crop, and horizontal flip.

    None centers the crop on the subject where a mask or the inspection locates it, else on the image.
    """

    left: float | None = None
    top: float | None = None
    is_flipped: bool = False


@dataclass(frozen=True)
class PreprocessedImage:
    """A preprocessed image: pixels `(3, H, W)` in [-1, 1], mask `(1, H, W)` in [0, 1], six `time_ids`.

    `time_ids` are the original height and width, the crop's top and left, and its height and width, in pixels
    (micro-conditioning of SDXL, arXiv 2307.01952).
    """

    pixels: Tensor
    mask: Tensor
    time_ids: list[int]


def preprocess_image(image: TrainingImage, *, size: Size, variant: CropFlip = CropFlip()) -> PreprocessedImage:
    """Scale an image to cover the size, preserving its aspect ratio, and crop the excess.

    Raises:
        ArtifactCorrupt: a file differs from its digest in the spec.

    """
    with Image.open(io.BytesIO(check_digest(Path(image.path), image.sha256))) as opened:
        picture = opened.convert("RGB")
    mask = load_mask(image, picture.size)
    width, height = scale_to_cover(picture.size, size)
    focus = find_focus(image, mask)
    left = place_crop(variant.left, width, size.width, focus=focus[0])
    top = place_crop(variant.top, height, size.height, focus=focus[1])
    crop = (left, top, left + size.width, top + size.height)  # x first, as in Pillow
    # `reducing_gap` resizes in two steps, faster for large photos; from 3.0 on the result is nearly the same.
    picture = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0).crop(crop)
    # BOX averages; LANCZOS would overshoot along the mask's edges.
    mask = mask.resize((width, height), Image.Resampling.BOX).crop(crop)
    # HWC uint8 -> CHW float32; `copy`, since Pillow's array is read-only.
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1.0
    opacity = torch.from_numpy(np.asarray(mask).copy())[None].float() / 255
    if variant.is_flipped:
        # The flipped crop's left edge, as if the whole image had been flipped first.
        pixels, opacity, left = pixels.flip(-1), opacity.flip(-1), width - size.width - left
    return PreprocessedImage(pixels, opacity, [*image.original_size(), top, left, size.height, size.width])


def load_mask(image: TrainingImage, size: tuple[int, int]) -> Image.Image:
    """Return an image's mask; without one, all of it. Raises ArtifactCorrupt."""
    if not image.mask_path:
        return Image.new("L", size, 255)
    with Image.open(io.BytesIO(check_digest(Path(image.mask_path), image.mask_sha256))) as opened:
        return opened.convert("L")


def scale_to_cover(photo: tuple[int, int], size: Size) -> tuple[int, int]:
    """Return width and height of a scaled photo that covers a size."""
    factor = max(size.width / photo[0], size.height / photo[1])
    # `max`, since rounding could leave the covering side a pixel short.
    return max(size.width, round(photo[0] * factor)), max(size.height, round(photo[1] * factor))


def find_focus(image: TrainingImage, mask: Image.Image) -> tuple[float, float]:
    """Return the point (x, y) to center a crop on, as fractions of width and height."""
    if image.focus is not None and not image.mask_path:
        return image.focus
    # Binarized, so that faint pixels do not widen the box. Without opaque pixels `getbbox` is None: the whole image.
    box = mask.point(lambda value: 255 * (value > 127)).getbbox() or (0, 0, *mask.size)
    return (box[0] + box[2]) / 2 / mask.width, (box[1] + box[3]) / 2 / mask.height


def place_crop(share: float | None, length: int, side: int, *, focus: float) -> int:
    """Return the crop's first pixel along one axis: at a fraction of the slack, or centered on `focus` and clamped."""
    free = length - side
    if share is not None:
        return round(free * share)
    return min(free, max(0, round(focus * length - side / 2)))


def plan_crops(spec: TrainingSpec, index: int) -> list[CropFlip]:
    """Return the variants of an instance image, unflipped ones first.

    Random crops are a function of the seed, the image's index and the crop's number.
    """
    num = spec.training.num_crop_variants
    if num == 0:
        places: list[tuple[float | None, float | None]] = [(None, None)]
    else:
        rows = [index * num + i for i in range(num)]  # unique per image and crop
        left = rng.draw_uniform(seed=spec.seed, purpose="instance/crop-left", indices=rows)
        top = rng.draw_uniform(seed=spec.seed, purpose="instance/crop-top", indices=rows)
        places = list(zip(left.tolist(), top.tolist(), strict=True))
    mirrorings = (False, True) if spec.training.flip_probability > 0 else (False,)
    # `choose_variants` relies on this order: `flipped * num_crops + crop`.
    return [CropFlip(left, top, is_flipped) for is_flipped in mirrorings for left, top in places]


def locate_crops(spec: TrainingSpec) -> dict[str, tuple[Box, ...]]:
    """Return the crops of each instance image by its digest; flipped ones are not repeated."""
    found = {}
    for size, indices in spec.assign_buckets().items():
        for index in indices:
            image = spec.instance_images[index]
            width, height = scale_to_cover((image.width, image.height), size)
            focus = find_focus(image, load_mask(image, (image.width, image.height)))
            places = [
                (
                    place_crop(variant.left, width, size.width, focus=focus[0]),
                    place_crop(variant.top, height, size.height, focus=focus[1]),
                )
                for variant in plan_crops(spec, index)
                if not variant.is_flipped
            ]
            found[image.sha256] = tuple(
                (x / width, y / height, (x + size.width) / width, (y + size.height) / height) for x, y in places
            )
    return found


def check_digest(path: Path, sha256: str) -> bytes:
    """Return a file's bytes. Raises ArtifactCorrupt if they differ from the digest."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtifactCorrupt(f"{path} changed after it was checked; run again to fetch it")
    return data
