"""The prior stage: class images from the frozen base model."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prefect import task
from prefect.client.schemas.objects import State

from tasks import diffusion as diffusion_code
from tasks.diffusion.config import DiffusionConfig
from tasks.manifests.base import ModelRef
from tasks.manifests.prior import ClassImageSet
from tasks.prior.config import PriorConfig
from tasks.prompts import write_class_prompt
from tasks.stage.cache import Stage, StageFolder
from tasks.stage.context import Runtime
from tasks.stage.states import finished

if TYPE_CHECKING:
    from tasks.diffusion.sampling.job import IndexedImage

STAGE_VERSION = 2


@dataclass(frozen=True)
class PriorInputs:
    """Everything that class images depend on: of the subject, only its class."""

    config: PriorConfig
    diffusion: DiffusionConfig
    base_model: ModelRef
    class_noun: str

    @property
    def class_prompt(self) -> str:
        """The prompt of every class image."""
        return write_class_prompt(self.config.class_prompt, class_noun=self.class_noun)

    def stage(self) -> Stage[ClassImageSet]:
        """Return the stage with its cache key."""
        sampling = self.diffusion.model_dump(mode="json", include={"family", "resolution", "sampler", "precision"})
        # Each image depends on its own seed alone, so batch size and number of devices are no part of the key.
        settings = self.config.model_dump(mode="json", exclude={"batch_size", "class_prompt", "num_devices"})
        return Stage(
            "prior",
            ClassImageSet,
            STAGE_VERSION,
            settings=[diffusion_code.VERSION, settings, sampling, self.class_prompt],
            inputs=(self.base_model.sha256,),
        )


@task(name="prior", persist_result=False)
def generate_class_images(inputs: PriorInputs, runtime: Runtime) -> State[ClassImageSet]:
    """Generate class images, or return the cached ones, which all subjects of the class share."""
    manifest = runtime.run_stage(inputs.stage(), lambda folder: compute_prior(folder, inputs, runtime))
    return finished(manifest, runtime)


def compute_prior(folder: StageFolder, inputs: PriorInputs, runtime: Runtime) -> ClassImageSet:
    """Generate the missing class images and write the manifest."""
    from tasks.diffusion.sampling.devices import find_devices, hold, sample
    from tasks.prior.generation import generate_class_images, plan_job

    config, diffusion, class_prompt = inputs.config, inputs.diffusion, inputs.class_prompt
    # Without class images none is needed.
    num_devices = config.num_devices if config.num_class_images else 1
    devices = find_devices("prior.num_devices", num_devices, diffusion=diffusion)

    # Called only where images are missing: a complete set loads no model.
    def draw(seeds: list[int]) -> "Generator[IndexedImage, None, None]":
        job = plan_job(diffusion, config, class_prompt=class_prompt, seeds=seeds)
        with hold(replace(devices, num=devices.limit(job)), diffusion, on_wait=runtime.wait_note("prior")):
            yield from sample(job, devices)

    images = generate_class_images(folder, config, draw=draw, on_progress=runtime.progress_callback("class images"))
    return folder.finish(
        ClassImageSet(
            **folder.head(STAGE_VERSION, counts={"images": len(images), **devices.counts()}),
            class_prompt=class_prompt,
            base_model=inputs.base_model,
            images=images,
        )
    )
