"""LLM profiles: one model at one provider each; roles name the profiles that serve them, cheapest first."""

import datetime
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tasks.config_base import OPERATOR_ONLY, PlainNames, Section, check_url

ROLES = ("inspector", "captioner", "profiler", "adjudicator", "judge", "second_judge", "reviewer")
RESPONSE_FORMATS = ("json_schema", "json_object", "tool", "json_mode", "text")
ResponseFormat = Literal["json_schema", "json_object", "tool", "json_mode", "text"]


KEY_FIELD = re.compile(
    r"(^|[_-])(api[_-]?key|authorization|secret|password|(access|auth|bearer)[_-]?token)$", re.IGNORECASE
)


def find_key_field(value: object) -> str:
    """Return the name of the first field, at any depth, that is named like a key; or nothing."""
    if isinstance(value, dict):
        for name, child in value.items():
            if found := str(name) if KEY_FIELD.search(str(name)) else find_key_field(child):
                return found
    if isinstance(value, list | tuple):
        return next(filter(None, map(find_key_field, value)), "")
    return ""


class PriceConfig(Section):
    """USD per million tokens."""

    input: float = Field(ge=0, description="input tokens")
    cached_input: float | None = Field(None, ge=0, description="input tokens from the provider's cache; null: as input")
    output: float = Field(ge=0, description="output tokens, reasoning included")
    batch_discount: float = Field(0.0, ge=0, le=1, description="discount of batch jobs, as a fraction")
    date: str = Field(description="day the prices were read")


class CapabilityConfig(Section):
    """Declared capabilities of a model; `likeness doctor` verifies them."""

    response_format: ResponseFormat | Literal["auto"] = Field(
        "auto", description="response format for structured output; auto: probed, strictest first"
    )
    images: tuple[Literal["jpeg", "png", "webp", "gif"], ...] = Field(
        ("jpeg", "png"), description="accepted image formats; empty: no image input"
    )
    tools: bool = Field(True, description="calls tools")
    reasoning: Literal["none", "effort", "openrouter"] = Field(
        "none", description="reasoning control per request; none: not configurable"
    )
    batch: Literal["none", "openai", "xai", "file", "local"] = Field(
        "none",
        description="batch protocol of the provider; file: a program that reads and writes JSONL; "
        "local: the JSONL through chat completions, by us",
    )
    web_search: Literal["none", "responses", "openrouter"] = Field(
        "none", description="web search; responses: OpenAI's Responses API, which xAI has too"
    )
    streaming: bool = Field(True, description="streams replies")
    context_tokens: int = Field(32_000, ge=1000, description="context window, reply included")
    pixels_per_token: int = Field(400, ge=1, description="approximate image pixels per input token")


class ProfileConfig(Section):
    """One model at one provider."""

    base_url: str | None = Field(None, description="API address; null starts the mini vision server")
    model: str = Field(description="model id at the provider")
    served_as: tuple[str, ...] = Field((), description="other ids that the provider reports for this model")
    api_key_variable: str | None = Field(None, description="environment variable that holds the key")
    capabilities: CapabilityConfig = CapabilityConfig()
    prices: PriceConfig | None = Field(None, description="null: cost is reported as unknown")
    retired_on: datetime.date | None = Field(None, description="day on which the provider retires the model")
    batch_command: tuple[str, ...] = Field(
        (), description="command of batch=file, with placeholders {input}, {output} and {model}"
    )
    fallback_models: tuple[str, ...] = Field(
        (), description="ids that OpenRouter tries in turn where the model is down; their prices differ"
    )
    max_price: tuple[float, float] | None = Field(
        None, description="USD per million input and output tokens that OpenRouter may pay at most"
    )
    extra_body: dict[str, object] = Field({}, description="added to every request, for example routing of OpenRouter")
    max_output_tokens: int = Field(600, ge=16, description="maximum tokens of a reply")
    reasoning_tokens: int = Field(2000, ge=0, description="added to that cap for requests with reasoning")
    timeout_seconds: float = Field(120, gt=0, description="total time of one call")
    max_attempts: int = Field(4, ge=1, le=10, description="attempts per call, the first included")
    concurrency: int = Field(4, ge=1, le=64, description="concurrent calls")
    requests_per_minute: int | None = Field(None, ge=1, description="calls started per minute; null: unlimited")
    tokens_per_minute: int | None = Field(None, ge=1000, description="input tokens per minute; null: unlimited")
    batch_tokens: int | None = Field(
        None, ge=1000, description="maximum input tokens of one batch job, where the provider has a limit"
    )
    image_urls: Literal["inline", "presigned"] = Field(
        "inline", description="presigned: as expiring URLs of the run's own bucket, readable by whoever has them"
    )
    max_image_side: int = Field(1024, ge=64, le=1024, description="longest side of images sent, pixels")

    @model_validator(mode="after")
    def check_batch(self) -> "ProfileConfig":
        """Reject capabilities.batch=file without a batch_command."""
        if self.capabilities.batch == "file" and not self.batch_command:
            raise ValueError("capabilities.batch=file needs batch_command")
        return self

    @field_validator("extra_body")
    @classmethod
    def check_body(cls, body: dict[str, object]) -> dict[str, object]:
        """Refuse keys: a configuration is written to files, reports and tracking servers."""
        if name := find_key_field(body):
            raise ValueError(f"{name} is a key; name its environment variable in api_key_variable instead")
        return body

    @model_validator(mode="after")
    def check_routing(self) -> "ProfileConfig":
        """Reject max_price where extra_body.provider is not a mapping."""
        if self.max_price is not None and not isinstance(self.extra_body.get("provider", {}), dict):
            raise ValueError("max_price goes into extra_body.provider, which has to be a mapping")
        return self

    def routing(self) -> dict[str, object]:
        """Return the fields added to every request: `extra_body`, fallback models and the price cap."""
        added = dict(self.extra_body)
        if self.fallback_models:
            added["models"] = [self.model, *self.fallback_models]
        if self.max_price is not None:
            provider = added.get("provider", {})
            assert isinstance(provider, dict)  # see check_routing
            prompt, completion = self.max_price
            added["provider"] = {**provider, "max_price": {"prompt": prompt, "completion": completion}}
        return added

    def fingerprint(self) -> dict[str, object]:
        """Return the fields that decide a reply; they are part of stage keys, unlike timeouts or prices."""
        return self.model_dump(
            include={"base_url", "model", "max_output_tokens", "reasoning_tokens", "max_image_side"}
        ) | {"routing": self.routing()}

    def is_served(self, served_model: str) -> bool:
        """Whether a served id is the requested model, possibly with a date or revision appended."""
        # Servers may drop the vendor prefix, and answer `gpt-x` as `gpt-x-2026-01-31`; `gpt-x-mini` is another model.
        names = (self.model, self.model.rsplit("/", 1)[-1], *self.served_as)
        return any(re.fullmatch(re.escape(name) + r"([-:][0-9][0-9-]*|@[\w.-]+)?", served_model) for name in names)

    @field_validator("base_url")
    @classmethod
    def check_url(cls, url: str | None) -> str | None:
        """Refuse addresses that carry secrets: they would be stored and logged."""
        return check_url(url)


class LlmConfig(Section):
    """Fallback chains by role, cheapest profile first: the next one is used after an unusable or doubtful reply."""

    models: PlainNames = Field(min_length=1, description="profiles of every role without its own")
    inspector: PlainNames = Field(description="inspects photos")
    captioner: PlainNames = Field(description="captions photos")
    profiler: PlainNames = Field(description="profiles the subject from all photos")
    adjudicator: PlainNames = Field(description="adjudicates doubtful photos with tools that measure them")
    judge: PlainNames = Field(description="grades samples")
    second_judge: PlainNames = Field(description="grades a fraction of the samples again; empty: disabled")
    reviewer: PlainNames = Field(description="interactive caption review")
    budget_usd: float | None = Field(ge=0, description="cap on the cost of a configuration, reruns included, USD")
    max_repair_fraction: float = Field(
        ge=0, le=1, description="maximum fraction of a stage's requests that may be repaired; rounded up"
    )
    profiles: Annotated[dict[str, ProfileConfig], OPERATOR_ONLY]

    @field_validator("models", *ROLES, mode="before")
    @classmethod
    def read_one(cls, value: object) -> object:
        """Accept a single name as a list of one."""
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def check_names(self) -> "LlmConfig":
        """Refuse roles whose profiles don't exist."""
        for role in ("models", *ROLES):
            for name in getattr(self, role):
                if name not in self.profiles:
                    known = ", ".join(self.profiles) or "none"
                    raise ValueError(f"{role} names profile {name!r}; there are: {known}")
        if self.budget_usd is not None:
            # Without a price a call would reserve nothing, and pass any cap.
            unpriced = [name for name in self.used_profiles() if self.profiles[name].prices is None]
            if unpriced:
                raise ValueError(f"budget_usd needs prices: set llm.profiles.{unpriced[0]}.prices")
        return self

    def fallback_chain(self, role: str) -> tuple[str, ...]:
        """Return the names of a role's profiles in order; the second judge has no default."""
        own: PlainNames = getattr(self, role)
        return own or (() if role == "second_judge" else self.models)

    def used_profiles(self) -> list[str]:
        """Return the names of all profiles that serve some role."""
        return list(dict.fromkeys(name for role in ROLES for name in self.fallback_chain(role)))

    def profile(self, role: str) -> ProfileConfig:
        """Return a role's first profile."""
        return self.profiles[self.fallback_chain(role)[0]]

    def fingerprint(self, role: str) -> list[dict[str, object]]:
        """Return the fields that decide a role's replies."""
        return [self.profiles[name].fingerprint() for name in self.fallback_chain(role)]
