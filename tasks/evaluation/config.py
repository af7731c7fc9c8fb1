"""Settings of the evaluation stage."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from tasks.config_base import CHECKED, MAX_SEED, PlainName, PlainText, RequestRule, Section
from tasks.encoders.config import EncoderConfig
from tasks.evaluation.prompt_sets import OWN_KIND, check_distinct, check_prompt


class PromptTemplate(Section):
    """An evaluation prompt and what it tests; a plain text is one of the kind `custom`."""

    text: Annotated[str, AfterValidator(check_prompt), CHECKED] = Field(description="{subject} or {noun} in a sentence")
    kind: PlainName = Field(min_length=1, description="scene, accessory, property, style, imaginative, or your own")

    @model_validator(mode="before")
    @classmethod
    def read_text(cls, value: object) -> object:
        """Accept a plain text."""
        return {"text": value, "kind": OWN_KIND} if isinstance(value, str) else value


class EvaluationConfig(Section):
    """Prompts, seeds and sampling of the evaluation, and its encoders."""

    prompts: Annotated[tuple[PromptTemplate, ...], RequestRule("prompts")] = Field(
        min_length=1,
        max_length=500,
        description="templates, in which {subject} and {noun} become identifier token and class noun; "
        "set:NAME, a shipped set; or file:PATH, text or YAML",
    )
    subject_kind: Literal["auto", "object", "living"] = Field(
        description="whose prompts set:NAME means; auto: as the class noun says"
    )
    num_images_per_prompt: int = Field(ge=1, le=64, description="seeds per prompt")
    num_class_images: int = Field(ge=2, le=1000, description="class samples for prior drift, per side")
    num_candidate_images: int = Field(
        ge=0, le=64, description="samples of each other retained checkpoint, for pairwise comparison"
    )
    num_inference_steps: int = Field(ge=1, le=1000, description="denoising steps")
    guidance_scale: float = Field(ge=1, le=30, description="classifier-free guidance")
    seed: int = Field(ge=0, le=MAX_SEED, description="seed of the first sample of a prompt")
    negative_prompt: PlainText = Field(description="what samples should not show; empty: none")
    guidance_rescale: float = Field(
        ge=0, le=1, description="rescale guided predictions against over-exposure (arXiv 2305.08891); 0: off"
    )
    lora_scale: float = Field(ge=0, le=2, description="strength of a LoRA in samples; 1: as trained")
    batch_size: int = Field(ge=1, le=256, description="images per denoising batch")
    num_devices: int = Field(
        ge=0, le=64, description="GPUs that sample in parallel; 0: all of this machine; the samples are the same"
    )
    safety_checker: Literal["auto", "none"] = Field(
        description="auto: samples that the base model's safety checker refuses are dropped and counted, where it has "
        "one (Stable Diffusion 1.x); none: nothing is checked"
    )
    encoders: EncoderConfig

    @field_validator("prompts")
    @classmethod
    def refuse_equal_prompts(cls, prompts: tuple[PromptTemplate, ...]) -> tuple[PromptTemplate, ...]:
        """Refuse prompts that are the same once filled in: their samples would be paired with each other."""
        check_distinct([prompt.text for prompt in prompts])
        return prompts
