"""Evaluated models as they are compared."""

from collections.abc import Mapping

from tasks.errors import ConfigError
from tasks.evaluation.comparison import Candidate
from tasks.manifests.evaluation import Evaluation
from tasks.manifests.scoring import Scorecard, SideScores
from tasks.manifests.subject import SubjectSet
from tasks.services.store.base import Store
from tasks.stage.cache import find_manifest


def load_evaluated(store: Store, name: str, keys: Mapping[str, str]) -> Candidate:
    """Return an evaluation with its grades, by the keys of its stages. Raises ConfigError for missing manifests."""
    evaluation = find_manifest(store, Evaluation, stage="evaluation", key=keys["evaluation"])
    subject = find_manifest(store, SubjectSet, stage="subject", key=keys["subject"])
    if evaluation is None or subject is None:
        raise ConfigError(f"the samples of run {name} are missing from the store; run it again")
    scores = None
    if "scoring" in keys:
        scores = find_manifest(store, Scorecard, stage="scoring", key=keys["scoring"])
    graded = scores.judgements if scores else ()
    return Candidate(
        name,
        evaluation,
        frozenset(image.source_sha256 for image in subject.images),
        {axis: {each.sample.key: getattr(each, axis) for each in graded} for axis in SideScores.model_fields},
        scores.served_model if scores else "",
    )
