"""One function for each metric of `tasks/metrics.py`: a value per sample `(N,)`, whose mean is the metric.

Cosines are between L2-normalized embeddings `(N, D)`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tasks.encoders.embeddings import Encoders
from tasks.intervals import estimate_few
from tasks.manifests.evaluation import Estimate
from tasks.metrics import METRICS

MEASURED_SIDE = 256
# Of the distance of the two nearest photos. That distance itself would raise false alarms: among M photos and a new
# one of the same subject, the nearest pair holds the new one with a chance of 2 / (M + 1), a third for five. A quarter
# takes at most one new photo in twenty of drawn subjects for a copy, and finds all that were scaled, blurred or noised.
COPY_FRACTION = 0.25


@dataclass(frozen=True)
class Features:
    """N images, their embeddings by both encoders and of their prompts by CLIP, each `(N, D)`."""

    clip: Tensor
    dino: Tensor
    texts: Tensor
    images: tuple[Image.Image, ...] = ()
    distances: Callable[[Sequence[Image.Image]], Tensor] | None = None
    """Perceptual distances of N images `(N, N)`; None where LPIPS has no weights."""

    def take(self, rows: Sequence[int]) -> "Features":
        """Return some of the images, by index."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.dino.device)
        images = tuple(self.images[row] for row in rows) if self.images else ()
        return Features(self.clip[index], self.dino[index], self.texts[index], images, self.distances)


MetricFunction = Callable[[Features, Features], Tensor | Sequence[float] | None]
"""Takes samples and the subject's photos; returns a value per sample, or None where it can't be measured."""


def extract_features(encoders: Encoders, images: Sequence[Image.Image], prompts: Sequence[str]) -> Features:
    """Encode images and their prompts, paired by index."""
    pictures = list(images)
    embedded = (encoders.encode_clip(pictures), encoders.encode_dino(pictures), encoders.encode_texts(list(prompts)))
    return Features(*embedded, images=tuple(pictures))


def find_functions() -> dict[str, MetricFunction]:
    """Return the functions of the registry's metrics by name."""
    return {name: globals()[f"measure_{name}"] for name in METRICS}


def measure_dino(samples: Features, photos: Features) -> Tensor:
    """Return each sample's mean cosine to the photos."""
    return (samples.dino @ photos.dino.T).mean(1)  # (N, D) @ (D, M) -> (N, M)


def measure_clip_i(samples: Features, photos: Features) -> Tensor:
    """Return each sample's mean cosine to the photos."""
    return (samples.clip @ photos.clip.T).mean(1)


def measure_clip_t(samples: Features, photos: Features) -> Tensor:
    """Return each sample's cosine to its own prompt."""
    return (samples.clip * samples.texts).sum(1)


def measure_pres(samples: Features, photos: Features) -> Tensor:
    """Return each class sample's mean cosine to the subject's photos."""
    return measure_dino(samples, photos)


def measure_div(samples: Features, photos: Features) -> Tensor | None:
    """Return jackknife pseudo-values of the mean LPIPS distance among samples."""
    if samples.distances is None or len(samples.images) < 2:
        return None
    return spread(samples.distances(samples.images))


def measure_dino_div(samples: Features, photos: Features) -> Tensor | None:
    """Return jackknife pseudo-values of the mean DINO distance among class samples."""
    return measure_dino_spread(samples, photos)


def measure_dino_spread(samples: Features, photos: Features) -> Tensor | None:
    """Return jackknife pseudo-values of the mean DINO distance among samples."""
    return spread(1 - samples.dino @ samples.dino.T) if len(samples.dino) > 1 else None


def measure_nearest(samples: Features, photos: Features) -> Tensor:
    """Return each sample's largest cosine to a photo."""
    return (samples.dino @ photos.dino.T).max(1).values


def measure_copies(samples: Features, photos: Features) -> Tensor | None:
    """Return 1 for each sample that is a near-duplicate of a photo, else 0; None for a single photo."""
    ceiling = find_nearest_pair(photos)
    if ceiling is None:
        return None
    return (1 - measure_nearest(samples, photos) <= COPY_FRACTION * (1 - ceiling)).float()


def measure_sharpness(samples: Features, photos: Features) -> list[float]:
    """Return the variance of each sample's Laplacian, as QC measures it on photos."""
    return [measure_laplacian(image) for image in samples.images]


def measure_laplacian(image: Image.Image) -> float:
    """Return the variance of the 4-neighbour Laplacian of luma (0 to 255) at a short side of 256 px."""
    scale = MEASURED_SIDE / min(image.size)
    size = (max(3, round(image.width * scale)), max(3, round(image.height * scale)))
    luma = np.asarray(image.convert("L").resize(size, Image.Resampling.BICUBIC), np.float64)
    inner = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]
    return float(inner.var())


def spread(distances: Tensor) -> Tensor:
    """Return jackknife pseudo-values `(N,)` of the mean over pairs of a distance matrix `(N, N)`, N > 1.

    Their mean is that of all pairs. A sample's mean distance to the others would do for the mean as well, but it varies
    half as much as the sample's influence on it, since each pair belongs to two samples: intervals would be too narrow.
    """
    num = len(distances)
    # Without the diagonal, whose zeros would lower the mean of small sets.
    others = (distances.sum(1) - distances.diagonal()) / (num - 1)
    mean = others.mean()
    # Pseudo-value: N U - (N - 1) U(-i), where U(-i) = (N U - 2 others_i) / (N - 2).
    return (2 * (num - 1) * others - num * mean) / (num - 2) if num > 2 else mean.expand(num)


def estimate_similarity(rows: Tensor) -> Estimate:
    """Return the mean cosine over pairs of different rows `(M, D)` with its interval; 1 for a single row.

    M photos have M (M - 1) / 2 pairs, which are not independent: each photo belongs to M - 1 of them, and an odd one
    lowers all of its own. So photos are left out, not pairs (jackknife): over pairs, intervals of five photos would
    cover three times in four.
    """
    if len(rows) < 2:
        return Estimate(mean=1.0, num=len(rows))
    if len(rows) == 2:  # the pseudo-values of both are that of the only pair
        return Estimate(mean=float((rows[0] * rows[1]).sum()), num=2)
    return estimate_few((1 - spread(1 - rows @ rows.T)).tolist())


def find_nearest_pair(photos: Features) -> float | None:
    """Return the largest DINO cosine of two different photos; None for a single one."""
    num = len(photos.dino)
    if num < 2:
        return None
    cosines = photos.dino @ photos.dino.T
    return float(cosines[~torch.eye(num, dtype=torch.bool, device=cosines.device)].max())


def measure_ceiling(photos: Features) -> dict[str, Estimate]:
    """Return the metrics among the real photos: what a perfect model could reach, for other photos like them."""
    nearest = find_nearest_pair(photos)
    found = {
        "dino": estimate_similarity(photos.dino),
        "clip_i": estimate_similarity(photos.clip),
        "clip_t": estimate_few(measure_clip_t(photos, photos).tolist()),
        # A maximum, not a mean: neither jackknife nor bootstrap has an interval for it.
        "nearest": None if nearest is None else Estimate(mean=nearest, num=len(photos.dino)),
        "sharpness": estimate_few(measure_sharpness(photos, photos)) if photos.images else None,
    }
    return {name: value.within(METRICS[name].range) for name, value in found.items() if value is not None}
