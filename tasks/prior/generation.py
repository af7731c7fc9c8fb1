"""Draw class images from the frozen base model: one seed each, lossless, kept one by one."""

from collections.abc import Callable, Iterator

from PIL import Image, ImageStat

from tasks.contract import StageFolder
from tasks.diffusion.base import DiffusionModel, SamplingRequest
from tasks.errors import ConfigError
from tasks.images import encode_png
from tasks.manifests import ClassImage
from tasks.prior.config import PriorConfig


def generate_class_images(
    folder: StageFolder,
    config: PriorConfig,
    *,
    class_prompt: str,
    load_model: Callable[[], DiffusionModel],
    on_progress: Callable[[int, int], None],
) -> tuple[ClassImage, ...]:
    """Return the class images, drawing only those that an earlier attempt didn't store.

    Raises:
        ConfigError: the base model draws flat pictures.

    """
    done: dict[int, ClassImage] = {}
    seeds = range(config.seed, config.seed + config.num_images)
    for seed in seeds:
        ref = folder.reuse(name_of(seed))
        if ref is not None:
            done[seed] = ClassImage(image=ref, seed=seed)
    missing = [seed for seed in seeds if seed not in done]
    on_progress(len(done), config.num_images)
    model = load_model() if missing else None
    for chunk in chunks(missing, config.batch_size):
        assert model is not None
        pictures = model.sample(
            [SamplingRequest(prompt=class_prompt, seed=seed) for seed in chunk],
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )
        for seed, picture in zip(chunk, pictures, strict=True):
            check_picture(picture, seed=seed)
            ref = folder.put_resumable(name_of(seed), encode_png(picture))
            done[seed] = ClassImage(image=ref, seed=seed)
        on_progress(len(done), config.num_images)
    return tuple(done[seed] for seed in seeds)


def name_of(seed: int) -> str:
    """Return the object name of a class image."""
    return f"images/{seed:06d}.png"


def chunks(seeds: list[int], size: int) -> Iterator[list[int]]:
    """Cut a list into batches."""
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]


def check_picture(picture: Image.Image, *, seed: int) -> None:
    """Refuse a flat picture: a broken model or number format draws black or gray."""
    if max(ImageStat.Stat(picture).stddev) < 2.0:
        raise ConfigError(f"class image of seed {seed} is flat; the base model or diffusion.precision is broken")
