"""Settings of the prior stage."""

from pydantic import Field

from tasks.config_base import MOST_SEED, ClassTemplate, Section


class PriorConfig(Section):
    """Class images for prior preservation."""

    num_class_images: int = Field(200, ge=0, le=10_000, description="class images; 0 turns the stage off")
    class_prompt: ClassTemplate = Field("a photo of {article} {class_noun}", description="prompt of the class")
    num_inference_steps: int = Field(25, ge=1, le=1000, description="denoising steps")
    guidance_scale: float = Field(7.5, ge=1, le=30, description="classifier-free guidance")
    seed: int = Field(0, ge=0, le=MOST_SEED, description="seed of the first class image; the next takes seed + 1")
    batch_size: int = Field(8, ge=1, le=256, description="images per denoising batch")
    num_devices: int = Field(1, ge=1, le=64, description="GPUs that draw at once; the images are the same")
