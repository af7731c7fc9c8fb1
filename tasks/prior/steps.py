"""The prior stage: class images from the frozen base model."""

from typing import Any

from prefect import task

from tasks import diffusion as diffusion_code
from tasks.diffusion.config import DiffusionConfig
from tasks.manifests.base import ModelRef
from tasks.manifests.prior import ClassImageSet
from tasks.prior.config import PriorConfig
from tasks.prompts import write_class_prompt
from tasks.stage.cache import StageFolder
from tasks.stage.context import Runtime
from tasks.stage.states import finished

STAGE_VERSION = 2


@task(name="prior", persist_result=False)
def generate_class_images(
    config: PriorConfig, diffusion: DiffusionConfig, class_noun: str, base_model: ModelRef, runtime: Runtime
) -> Any:
    """Draw class images, or take the stored ones: they serve every subject of the class."""
    class_prompt = write_class_prompt(config.class_prompt, class_noun=class_noun)
    sampling = diffusion.model_dump(mode="json", include={"family", "resolution", "sampler", "precision"})
    manifest = runtime.run_stage(
        ClassImageSet,
        "prior",
        version=STAGE_VERSION,
        settings=[
            diffusion_code.VERSION,
            config.model_dump(mode="json", exclude={"batch_size", "class_prompt", "num_devices"}),
            sampling,
            class_prompt,
        ],
        inputs=[base_model.sha256],
        compute=lambda folder: compute_prior(folder, config, diffusion, class_prompt, base_model, runtime),
    )
    return finished(manifest, runtime)


def compute_prior(
    folder: StageFolder,
    config: PriorConfig,
    diffusion: DiffusionConfig,
    class_prompt: str,
    base_model: ModelRef,
    runtime: Runtime,
) -> ClassImageSet:
    """Draw what is missing and write the manifest."""
    from tasks.diffusion.adapter import release_memory
    from tasks.diffusion.registry import open_model
    from tasks.prior.generation import draw_pictures, generate_class_images
    from tasks.prior.sharding import draw_on_devices

    def draw(seeds: list[int]) -> Any:
        if config.num_devices > 1:
            return draw_on_devices(diffusion, config, class_prompt=class_prompt, seeds=seeds)
        return draw_pictures(open_model(diffusion), config, class_prompt=class_prompt, seeds=seeds)

    images = generate_class_images(folder, config, draw=draw, on_progress=runtime.show("class images"))
    release_memory()
    return folder.finish(
        ClassImageSet,
        version=STAGE_VERSION,
        counts={"images": len(images)},
        class_prompt=class_prompt,
        base_model=base_model,
        images=images,
    )
