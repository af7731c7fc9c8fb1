"""Settings of the publishing stage."""

from pydantic import Field

from tasks.config_base import PlainText, Section


class GateConfig(Section):
    """What a model must reach to become the champion of its subject; the report's verdict uses the same limits."""

    min_dino_gain: float = Field(
        ge=-2, le=2, description="the interval of the gain in DINO over the base model must lie above"
    )
    max_clip_t_loss: float = Field(ge=0, le=1, description="fraction of the base model's CLIP-T that may be lost")
    max_pres_gain: float = Field(ge=0, le=2, description="increase of PRES, the drift of the class to the subject")
    max_copies: float = Field(ge=0, le=1, description="share of samples that copy a photo")
    needs_reliable_judge: bool = Field(description="whether the judge must have passed its controls")


class PublishingConfig(Section):
    """What a run publishes."""

    is_registered: bool = Field(description="register the tuned model with the tracking server")
    is_promoted: bool = Field(
        description="move the alias `champion` to the registered model where it passes the gate and beats the champion"
    )
    gate: GateConfig
    title: PlainText = Field(
        max_length=120, description="title of report and model card; empty: made from the class noun"
    )
