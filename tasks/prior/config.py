"""Settings of the prior stage."""

from pydantic import Field

from tasks.config_base import MAX_SEED, ClassTemplate, Section


class PriorConfig(Section):
    """Class images for prior preservation."""

    num_class_images: int = Field(ge=0, le=10_000, description="class images; 0 disables the stage")
    class_prompt: ClassTemplate = Field(description="prompt of the class")
    num_inference_steps: int = Field(ge=1, le=1000, description="denoising steps")
    guidance_scale: float = Field(ge=1, le=30, description="classifier-free guidance")
    seed: int = Field(ge=0, le=MAX_SEED, description="seed of the first class image; the next takes seed + 1")
    batch_size: int = Field(ge=1, le=256, description="images per denoising batch")
    num_devices: int = Field(
        ge=0, le=64, description="GPUs that generate in parallel; 0: all of this machine; the images are the same"
    )
