"""Settings of the prior stage."""

import string

from pydantic import Field, field_validator

from tasks.settings import Section


def check_template(template: str) -> str:
    """Refuse placeholders other than {article} and {class_noun}."""
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise ValueError(f"{template!r} has unbalanced braces") from error
    if not fields <= {"article", "class_noun"}:
        raise ValueError(f"{template!r} may hold {{article}} and {{class_noun}} only")
    return template


class PriorConfig(Section):
    """Class images for prior preservation."""

    num_images: int = Field(200, ge=0, le=10_000, description="class images; 0 turns the stage off")
    class_prompt: str = Field("a photo of {article} {class_noun}", description="prompt of the class")
    check_class_prompt = field_validator("class_prompt")(check_template)
    num_inference_steps: int = Field(25, ge=1, le=1000, description="denoising steps")
    guidance_scale: float = Field(7.5, ge=1, le=30, description="classifier-free guidance")
    seed: int = Field(0, ge=0, description="seed of the first class image; the next takes seed + 1")
    batch_size: int = Field(8, ge=1, le=256, description="images per denoising batch")
    num_devices: int = Field(1, ge=1, le=64, description="GPUs that draw at once; the images are the same")
