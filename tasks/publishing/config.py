"""Settings of the publishing stage."""

from typing import Literal

from pydantic import Field

from tasks.config_base import PlainText, Section

MIN_KNEE = 3
"""Checkpoints that a knee takes at least."""


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
    pick: Literal["best", "last", "knee"] = Field(
        description="published weights among the retained checkpoints. best: as training.validation.keep says; last: "
        "the latest; knee: after which subject fidelity costs more prompt fidelity than before"
    )
    gate: GateConfig
    title: PlainText = Field(
        max_length=120, description="title of report and model card; empty: made from the class noun"
    )
