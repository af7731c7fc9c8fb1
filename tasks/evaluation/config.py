"""Settings of the evaluation stage."""

from pydantic import Field

from tasks.config_base import MAX_SEED, Section, SubjectTemplates
from tasks.encoders.config import EncoderConfig


class EvaluationConfig(Section):
    """Prompts, seeds and sampling of the evaluation, and its encoders."""

    prompts: SubjectTemplates = Field(
        min_length=1, description="templates; {subject} becomes identifier token and class noun"
    )
    num_images_per_prompt: int = Field(ge=1, le=64, description="seeds per prompt")
    num_class_images: int = Field(ge=2, le=1000, description="class samples for prior drift, per side")
    num_candidate_images: int = Field(
        ge=0, le=64, description="samples of each other retained checkpoint, for pairwise comparison"
    )
    num_inference_steps: int = Field(ge=1, le=1000, description="denoising steps")
    guidance_scale: float = Field(ge=1, le=30, description="classifier-free guidance")
    seed: int = Field(ge=0, le=MAX_SEED, description="seed of the first sample of a prompt")
    batch_size: int = Field(ge=1, le=256, description="images per denoising batch")
    encoders: EncoderConfig
