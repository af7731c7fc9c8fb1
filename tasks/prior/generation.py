"""Generate class images with the frozen base model: one seed each, stored individually as lossless PNG."""

from collections.abc import Callable, Generator
from contextlib import closing

from PIL import Image, ImageStat

from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.sampling.job import IndexedImage, SamplingJob
from tasks.diffusion.types import SamplingRequest
from tasks.errors import ConfigError
from tasks.images import encode_png
from tasks.manifests.prior import ClassImage
from tasks.prior.config import PriorConfig
from tasks.stage.cache import StageFolder

Draw = Callable[[list[int]], Generator[IndexedImage, None, None]]
"""Maps seeds to their positions and images, in any order."""


def generate_class_images(
    folder: StageFolder, config: PriorConfig, *, draw: Draw, on_progress: Callable[[int, int], None]
) -> tuple[ClassImage, ...]:
    """Return the class images by ascending seed; only those that no earlier attempt stored are generated.

    Raises:
        ConfigError: an image is nearly uniform.

    """
    done: dict[int, ClassImage] = {}
    seeds = range(config.seed, config.seed + config.num_class_images)
    for seed in seeds:
        ref = folder.reuse(name_of(seed))  # None unless complete and verified
        if ref is not None:
            done[seed] = ClassImage(image=ref, seed=seed)
    missing = [seed for seed in seeds if seed not in done]
    on_progress(len(done), config.num_class_images)
    if not missing:
        return tuple(done[seed] for seed in seeds)
    with closing(draw(missing)) as drawn:  # also after an error: it holds GPUs and processes
        for position, picture in drawn:
            seed = missing[position]
            check_picture(picture, seed=seed)
            # Stored one by one: an interrupted run loses a batch at most.
            ref = folder.put_resumable(name_of(seed), encode_png(picture, is_generated=True))
            done[seed] = ClassImage(image=ref, seed=seed)
            on_progress(len(done), config.num_class_images)
    return tuple(done[seed] for seed in seeds)


def plan_job(diffusion: DiffusionConfig, config: PriorConfig, *, class_prompt: str, seeds: list[int]) -> SamplingJob:
    """Return the job of one image per seed."""
    return SamplingJob(
        diffusion=diffusion,
        requests=tuple(SamplingRequest(prompt=class_prompt, seed=seed) for seed in seeds),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        batch_size=config.batch_size,
    )


def name_of(seed: int) -> str:
    """Return the object name of a class image."""
    return f"images/{seed:06d}.png"


def check_picture(picture: Image.Image, *, seed: int) -> None:
    """Refuse a nearly uniform image: a broken model or an overflow in half precision gives black or gray."""
    if max(ImageStat.Stat(picture).stddev) < 2.0:  # in 8-bit levels, of the channel that varies most
        raise ConfigError(f"class image of seed {seed} is flat; the base model or diffusion.precision is broken")
