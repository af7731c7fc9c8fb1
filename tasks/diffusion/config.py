"""Settings of the base model."""

from typing import Literal

from pydantic import Field

from tasks.config_base import ModelName, PlainName, Section


class DiffusionConfig(Section):
    """The base model and its sampling."""

    family: Literal["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"] = Field(
        description="model adapter"
    )
    pretrained_model_name_or_path: ModelName = Field(
        description="diffusers folder, hub repository, or mini: the shipped model"
    )
    revision: PlainName | None = Field(description="pinned commit of a hub repository")
    resolution: int = Field(ge=32, le=4096, multiple_of=16, description="side of training images and samples, pixels")
    sampler: Literal["ddim", "dpm++", "euler"] = Field(description="scheduler used for sampling")
    precision: Literal["fp32", "bf16", "fp16"] = Field(description="number format of sampling")
    device: Literal["auto", "cpu", "cuda"] = Field(description="auto: a GPU if there is one")
