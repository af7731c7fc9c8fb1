"""Images to sample with the weights of one model."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.config_base import Section
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.registry import load_model
from tasks.diffusion.types import SamplingRequest

if TYPE_CHECKING:
    from PIL.Image import Image

    from tasks.diffusion.adapter import DiffusionModel

IndexedImage = tuple[int, "Image"]
"""The position of a request in its job, and its image."""


class SamplingJob(Section):
    """Weights, settings and requests; a process that samples reads no other configuration."""

    diffusion: DiffusionConfig
    weights: str | None = None
    """Folder of the tuned model; None: the base model."""
    lora_scale: float = 1.0
    requests: tuple[SamplingRequest, ...]
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float = 0.0
    batch_size: int

    def load(self) -> "DiffusionModel":
        """Load the model."""
        folder = None if self.weights is None else Path(self.weights)
        return load_model(self.diffusion, folder=folder, lora_scale=self.lora_scale)


def sample_in_batches(
    model: "DiffusionModel", job: SamplingJob, positions: "range | None" = None
) -> Iterator[IndexedImage]:
    """Yield the images at some positions, or all, batch by batch; an image doesn't depend on its batch."""
    chosen = range(len(job.requests)) if positions is None else positions
    for start in range(0, len(chosen), job.batch_size):
        chunk = chosen[start : start + job.batch_size]
        pictures = model.sample(
            [job.requests[position] for position in chunk],
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            guidance_rescale=job.guidance_rescale,
        )
        yield from zip(chunk, pictures, strict=True)
