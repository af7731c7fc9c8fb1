"""`RunConfig`: the shape of a whole run, and the only place for rules across stages."""

import importlib.util
from types import UnionType
from typing import Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, model_validator

from tasks.config_base import LocalPath, Section, is_number
from tasks.diffusion.config import DiffusionConfig
from tasks.evaluation.config import EvaluationConfig
from tasks.evaluation.prompt_sets import resolve_prompts
from tasks.prior.config import PriorConfig
from tasks.publishing.config import MIN_KNEE, PublishingConfig
from tasks.scoring.config import ScoringConfig
from tasks.services.config import StoreConfig, TrackingConfig
from tasks.services.llm.config import LlmConfig
from tasks.subject.config import SubjectConfig
from tasks.training.config import TrainingConfig

MINI = "mini"
MIN_WORKING_SIDE = 768  # the LLM sees the kept photos


def derive_working_side(resolution: int) -> int:
    """Return the short side of stored photos, so that a crop of two thirds of it still has the training resolution."""
    return max(MIN_WORKING_SIDE, resolution * 3 // 2)


class RunConfig(Section):
    """Everything a run depends on; stages get their slice."""

    output_dir: LocalPath = Field(min_length=1, description="run folders, local store, tracking database")
    seed: int = Field(ge=0, le=2**31 - 1, description="seed of training")
    subject: SubjectConfig
    prior: PriorConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    scoring: ScoringConfig
    publishing: PublishingConfig
    diffusion: DiffusionConfig
    llm: LlmConfig
    store: StoreConfig
    tracking: TrackingConfig

    @property
    def is_mini(self) -> bool:
        """Whether the base model is the shipped one."""
        return self.diffusion.pretrained_model_name_or_path == MINI

    def count_candidates(self) -> int:
        """Return the maximum number of retained checkpoints besides the published one."""
        validation = self.training.validation
        # The best of the top k is the published one.
        return validation.save_top_k - 1 if validation.keep == "best" and validation.validation_steps else 0

    # Before validation, since sections are frozen afterwards.
    @model_validator(mode="before")
    @classmethod
    def fill_working_side(cls, values: object) -> object:
        """Derive subject.working_side from the resolution where it is null."""
        if not isinstance(values, dict):
            return values
        subject, diffusion = values.get("subject"), values.get("diffusion")
        resolution = diffusion.get("resolution") if isinstance(diffusion, dict) else None
        if isinstance(subject, dict) and subject.get("working_side") is None and isinstance(resolution, int):
            return {**values, "subject": {**subject, "working_side": derive_working_side(resolution)}}
        return values

    @model_validator(mode="before")
    @classmethod
    def fill_prompts(cls, values: object) -> object:
        """Replace `set:NAME` and `file:PATH` by the prompts themselves; which ones depends on the class noun."""
        if not isinstance(values, dict):
            return values
        subject, evaluation = values.get("subject"), values.get("evaluation")
        if not (isinstance(subject, dict) and isinstance(evaluation, dict)):
            return values
        source, kind = evaluation.get("prompts"), evaluation.get("subject_kind", "auto")
        if not isinstance(source, str):
            return values
        # Another kind is refused by its own field, alone.
        known = kind if kind in ("auto", "object", "living") else "auto"
        prompts = resolve_prompts(source, class_noun=str(subject.get("class_noun")), subject_kind=known)
        return {**values, "evaluation": {**evaluation, "prompts": prompts}}

    @model_validator(mode="after")
    def check_prior(self) -> "RunConfig":
        """Refuse prior preservation without class images."""
        if self.training.prior_loss_weight > 0 and self.prior.num_class_images == 0:
            raise ValueError(
                "training.prior_loss_weight is above 0 but prior.num_class_images is 0: set prior=none, or "
                "prior.num_class_images"
            )
        return self

    @model_validator(mode="after")
    def check_sampling(self) -> "RunConfig":
        """Reject sampling options that the family's pipeline lacks, before anything is trained."""
        family, evaluation = self.diffusion.family, self.evaluation
        if evaluation.guidance_rescale > 0 and family in ("stable_diffusion_3", "flux"):
            raise ValueError(f"evaluation.guidance_rescale: {family} has no guidance_rescale; set it to 0")
        if evaluation.negative_prompt and family == "flux":
            raise ValueError("evaluation.negative_prompt: guidance of flux is distilled; set it to an empty text")
        return self

    @model_validator(mode="after")
    def check_validation(self) -> "RunConfig":
        """Reject settings that need validation where it is disabled."""
        validation = self.training.validation
        if validation.validation_steps == 0 and (validation.keep == "best" or validation.early_stopping):
            raise ValueError("training.validation: keep=best and early_stopping need validation_steps above 0")
        if self.publishing.pick == "knee" and self.count_candidates() < MIN_KNEE - 1:
            raise ValueError(
                f"publishing.pick=knee needs {MIN_KNEE} retained checkpoints: set training.validation.keep=best, "
                f"validation_steps above 0 and save_top_k to {MIN_KNEE} or more"
            )
        if self.publishing.pick == "knee" and self.evaluation.num_candidate_images == 0:
            raise ValueError("publishing.pick=knee measures checkpoints: set evaluation.num_candidate_images above 0")
        return self

    @model_validator(mode="after")
    def check_packages(self) -> "RunConfig":
        """Reject settings whose optional package is missing, before anything is billed."""
        packages = {
            "prodigy": "prodigyopt",
            "adamw8bit": "bitsandbytes",
            "tensorboard": "tensorboard",
            "wandb": "wandb",
        }
        for setting in (self.training.optimizer, *self.tracking.loggers):
            package = packages.get(setting)
            if package and importlib.util.find_spec(package) is None:
                raise ValueError(f"{setting} needs the package {package}: pip install {package}")
        return self

    @model_validator(mode="after")
    def check_roles(self) -> "RunConfig":
        """Reject the mini vision server with other base models, and profiles that lack a capability that is needed."""
        for name in self.llm.used_profiles():
            if self.llm.profiles[name].base_url is None and not self.is_mini:
                raise ValueError(
                    f"llm profile {name} is the mini vision server, which knows only the drawn world, "
                    f"with base model {self.diffusion.pretrained_model_name_or_path}: "
                    "set llm=openai (or xai, openrouter, azure, vllm)"
                )
        for name in self.llm.used_profiles():
            if self.llm.profiles[name].image_urls == "presigned" and self.store.kind != "s3":
                raise ValueError(f"llm profile {name}: image_urls=presigned needs a bucket; set store=s3")
        if self.subject.web_lookup.enabled and not any(
            self.llm.profiles[name].capabilities.web_search != "none" for name in self.llm.fallback_chain("profiler")
        ):
            raise ValueError(
                "subject.web_lookup.enabled needs a profiler that searches the web: llm=openai, xai or openrouter"
            )
        judge = self.llm.profile("judge")
        if self.scoring.executor == "batch" and judge.capabilities.batch == "none":
            raise ValueError(f"{judge.model} has no batch API that is known here: set scoring=sync")
        return self

    @model_validator(mode="after")
    def check_photos(self) -> "RunConfig":
        """Reject contradictory bounds on photos."""
        if self.subject.min_images > self.subject.max_images:
            raise ValueError("subject.min_images is above subject.max_images")
        if self.subject.min_brightness >= self.subject.max_brightness:
            raise ValueError("subject.min_brightness is not below subject.max_brightness")
        return self

    @model_validator(mode="after")
    def check_registry(self) -> "RunConfig":
        """Refuse a registry without a tracking server."""
        if self.publishing.is_registered and self.tracking.kind == "none":
            raise ValueError("publishing.is_registered needs tracking=mlflow; or set publishing=local")
        return self


def find_annotation(name: str) -> object:
    """Return the type of a setting; None where there is no such setting."""
    annotation: object = RunConfig
    for part in name.split("."):
        is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        field = annotation.model_fields.get(part) if is_section else None  # type: ignore[attr-defined]
        if field is None:
            return None
        annotation = field.annotation
    return annotation


def find_kind(name: str) -> Literal["integer", "number", "other", "unknown"]:
    """Return the type of values that a setting takes."""
    annotation = find_annotation(name)
    if not is_number(annotation):
        return "unknown" if annotation is None else "other"
    return "number" if annotation is float or float in get_args(annotation) else "integer"


def list_choices(name: str) -> tuple[str, ...]:
    """Return the fixed choices of a setting; none where it has no such type."""
    annotation = find_annotation(name)
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(str(value) for part in parts if get_origin(part) is Literal for value in get_args(part))
