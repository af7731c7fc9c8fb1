"""Subject fidelity, prompt fidelity and prior drift (arXiv 2208.12242, section 4).

All but DIV are cosines between L2-normalized embeddings, `(N, D)`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from PIL import Image
from torch import Tensor

from tasks.encoders.embeddings import Encoders
from tasks.manifests.evaluation import CeilingMetrics, DriftMetrics, Side, SubjectMetrics


@dataclass(frozen=True)
class Features:
    """Embeddings of N images by both encoders and of their prompts by CLIP, each `(N, D)`."""

    clip: Tensor
    dino: Tensor
    texts: Tensor


def extract_features(encoders: Encoders, images: Sequence[Image.Image], prompts: Sequence[str]) -> Features:
    """Encode images and their prompts, paired by index."""
    pictures = list(images)
    return Features(
        encoders.encode_clip(pictures), encoders.encode_dino(pictures), encoders.encode_texts(list(prompts))
    )


def mean_similarity(first: Tensor, second: Tensor) -> float:
    """Return the mean cosine over all pairs of two sets."""
    return float((first @ second.T).mean())  # (N, D) @ (D, M) -> (N, M)


def mean_pairwise_similarity(rows: Tensor) -> float:
    """Return the mean cosine over pairs of different rows; 1 for a single row."""
    # Without the diagonal, whose cosines of 1 would inflate the mean of small sets.
    num = len(rows)
    if num < 2:
        return 1.0
    # Sum over all N^2 pairs less the N on the diagonal: N (N - 1) ordered pairs of different rows.
    total = float((rows @ rows.T).sum()) - float((rows * rows).sum())
    return total / (num * (num - 1))


def measure_subject(samples: Features, photos: Features) -> SubjectMetrics:
    """Return DINO and CLIP-I against the photos, CLIP-T against the class prompts."""
    return SubjectMetrics(
        dino=mean_similarity(samples.dino, photos.dino),
        clip_i=mean_similarity(samples.clip, photos.clip),
        # Row by row: each sample with its own prompt.
        clip_t=float((samples.clip * samples.texts).sum(1).mean()),
    )


def measure_each(samples: Features, photos: Features) -> list[SubjectMetrics]:
    """Return each sample's metrics; their means are those of `measure_subject`."""
    return [
        measure_subject(Features(samples.clip[i : i + 1], samples.dino[i : i + 1], samples.texts[i : i + 1]), photos)
        for i in range(len(samples.dino))
    ]


def measure_ceiling(photos: Features) -> CeilingMetrics:
    """Return the same metrics among the real photos: what a perfect model could reach."""
    return CeilingMetrics(
        dino=mean_pairwise_similarity(photos.dino),
        clip_i=mean_pairwise_similarity(photos.clip),
        clip_t=float((photos.clip * photos.texts).sum(1).mean()),
    )


def measure_drift(class_samples: Features, photos: Features, *, div: float | None = None) -> DriftMetrics:
    """Return PRES (lower is better) and the given DIV of the paper, and DINO distance among class samples."""
    return DriftMetrics(
        pres=mean_similarity(class_samples.dino, photos.dino),
        dino_div=1.0 - mean_pairwise_similarity(class_samples.dino),
        div=div,
    )


def measure_div(prompts: Sequence[Sequence[Image.Image]], distance: Callable[[Sequence[Image.Image]], float]) -> float:
    """Return DIV: the mean distance among samples of a prompt, averaged over prompts with several samples."""
    values = [distance(pictures) for pictures in prompts if len(pictures) > 1]
    return sum(values) / len(values)  # not empty: the caller requires two samples per prompt


@dataclass(frozen=True)
class Measured:
    """All metrics of one evaluation."""

    metrics: dict[Side, SubjectMetrics]
    drift: dict[Side, DriftMetrics]
    ceiling: CeilingMetrics


def measure_all(
    photos: Features,
    subjects: dict[Side, Features],
    classes: dict[Side, Features],
    *,
    div: Mapping[Side, float] = MappingProxyType({}),
) -> Measured:
    """Compute fidelity and drift of both sides, and the ceiling."""
    return Measured(
        metrics={side: measure_subject(rows, photos) for side, rows in subjects.items()},
        drift={side: measure_drift(rows, photos, div=div.get(side)) for side, rows in classes.items()},
        ceiling=measure_ceiling(photos),
    )
