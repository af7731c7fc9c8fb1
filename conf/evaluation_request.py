"""`EvaluationRequest`: a model that was trained elsewhere, and what it is measured with."""

from pydantic import BaseModel, ConfigDict, Field, field_validator

from conf.request import RunRequest, check_string


class EvaluationRequest(BaseModel):
    """Which model, and the photos and settings that a run of the same subject has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        max_length=4_000,
        description="a diffusers folder; or a LoRA (diffusers or kohya keys) or textual-inversion embedding in "
        "safetensors, for the configured base model",
        json_schema_extra={"position": 0},
    )
    base: RunRequest = Field(
        default_factory=RunRequest,
        description="photos, class noun and settings, as of a run; those of training are not used",
        json_schema_extra={"position": 1},
    )

    @field_validator("model")
    @classmethod
    def check_model(cls, value: str) -> str:
        """Refuse control characters and an empty name."""
        check_string("model", value)
        if not value.strip():
            raise ValueError("name a folder or a file")
        return value
