"""LLM profiles: models are data."""

from pydantic import Field, field_validator

from tasks.settings import Section, refuse_user_info


class PriceConfig(Section):
    """USD per million tokens."""

    input: float = Field(ge=0, description="input tokens")
    output: float = Field(ge=0, description="output tokens")
    batch_discount: float = Field(0.5, ge=0, le=1, description="share taken off in batch jobs")
    date: str = Field(description="day the prices were read")


class ProfileConfig(Section):
    """One model at one provider."""

    base_url: str | None = Field(None, description="API address; null starts the mini vision server")
    model: str = Field(description="model id as the provider spells it")
    api_key_variable: str | None = Field(None, description="environment variable that holds the key")
    prices: PriceConfig | None = Field(None, description="null: cost is reported as unknown")
    max_output_tokens: int = Field(600, ge=16, description="cap on a reply")
    timeout_seconds: float = Field(120, gt=0, description="total time of one call")
    max_attempts: int = Field(4, ge=1, le=10, description="tries of one call, the first included")
    concurrency: int = Field(4, ge=1, le=64, description="calls at once")
    max_image_side: int = Field(1024, ge=64, le=1024, description="images go out at most this large, pixels")

    def identity(self) -> dict[str, object]:
        """Return what decides an answer: the fields that a stage key covers."""
        return self.model_dump(include={"base_url", "model", "max_output_tokens", "max_image_side"})

    @field_validator("base_url")
    @classmethod
    def check_url(cls, url: str | None) -> str | None:
        """Refuse addresses that carry a name or password: they would be stored and logged."""
        return refuse_user_info(url)


class LlmConfig(Section):
    """Which profile serves which role."""

    inspector: str = Field(description="profile that inspects photos")
    captioner: str = Field(description="profile that captions photos")
    judge: str = Field(description="profile that grades samples")
    profiles: dict[str, ProfileConfig]

    def profile(self, role: str) -> ProfileConfig:
        """Return the profile of a role."""
        return self.profiles[str(getattr(self, role))]
