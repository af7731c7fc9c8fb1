"""Inputs of the training stage and its cache key."""

from dataclasses import dataclass, replace

from tasks import diffusion as diffusion_code
from tasks import encoders as encoders_code
from tasks.diffusion.config import DiffusionConfig
from tasks.encoders.config import EncoderConfig
from tasks.encoders.folders import identify_encoders
from tasks.manifests.prior import ClassImageSet
from tasks.manifests.subject import SubjectSet
from tasks.manifests.training import TunedModel
from tasks.stage.cache import Stage
from tasks.training.config import TrainingConfig

STAGE_VERSION = 5


@dataclass(frozen=True)
class TrainingInputs:
    """Everything that the tuned model depends on."""

    config: TrainingConfig
    diffusion: DiffusionConfig
    encoders: EncoderConfig
    """Used where `validation.metric` is similarity, to select the best checkpoint."""
    seed: int
    subject: SubjectSet
    prior: ClassImageSet

    def with_config(self, config: TrainingConfig) -> "TrainingInputs":
        """Return a copy with another configuration."""
        return replace(self, config=config)

    @property
    def uses_class_images(self) -> bool:
        """Whether there is prior preservation."""
        return self.config.prior_loss_weight > 0

    def stage(self) -> Stage[TunedModel]:
        """Return the stage that trains it."""
        config = self.config
        is_measured = config.validation.metric != "loss"
        # Encoders change the weights only where similarity selects the best checkpoint.
        measuring = [self.encoders.model_dump(), identify_encoders(self.encoders)] if is_measured else []
        # Sampler and sampling precision don't affect training, so changing them keeps the cached model.
        resolution = self.diffusion.model_dump(mode="json", include={"family", "resolution"})
        versions = [diffusion_code.VERSION, encoders_code.VERSION]
        return Stage(
            "training",
            TunedModel,
            STAGE_VERSION,
            settings=[*versions, config.result_fields(), resolution, self.seed, *measuring],
            inputs=(
                self.prior.base_model.sha256,
                self.subject.compute_content_digest(),
                # Without prior preservation, other class images keep the cached model.
                self.prior.compute_content_digest() if self.uses_class_images else "",
            ),
        )
