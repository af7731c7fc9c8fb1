"""The manifests of one run, by stage."""

from dataclasses import dataclass

from tasks.manifests.base import Manifest
from tasks.manifests.evaluation import Evaluation
from tasks.manifests.prior import ClassImageSet
from tasks.manifests.scoring import Scorecard
from tasks.manifests.subject import SubjectSet
from tasks.manifests.training import TunedModel


@dataclass(frozen=True)
class RunManifests:
    """The manifests that publishing and the report read."""

    subject: SubjectSet
    prior: ClassImageSet | None
    """None for a model from elsewhere."""
    training: TunedModel
    evaluation: Evaluation
    scoring: Scorecard
    published_because: str = ""
    """Why these weights are published and not another checkpoint's."""

    def ordered(self) -> tuple[Manifest, ...]:
        """Return the manifests in the order of the stages."""
        stages = (self.subject, self.prior, self.training, self.evaluation, self.scoring)
        return tuple(manifest for manifest in stages if manifest is not None)

    def content_digests(self) -> tuple[str, ...]:
        """Return the digest of every manifest's content."""
        return tuple(manifest.compute_content_digest() for manifest in self.ordered())
