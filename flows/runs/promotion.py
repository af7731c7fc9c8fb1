"""Which registered model is the champion of its subject: the alias moves where the gate and a comparison allow it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.manifests.evaluation import Evaluation
from tasks.manifests.run_summary import RegisteredModel
from tasks.manifests.scoring import Scorecard, SideScores
from tasks.manifests.subject import SubjectSet
from tasks.services.store.base import Store
from tasks.services.tracking.base import Tracker, Version
from tasks.stage.cache import find_manifest

if TYPE_CHECKING:
    from tasks.evaluation.comparison import Candidate

CHAMPION = "champion"


@dataclass(frozen=True)
class Contender:
    """A registered version, the keys of its stages, and what the gate has against it."""

    model: str
    version: str
    keys: dict[str, str]
    blockers: tuple[str, ...] = ()


def promote(tracker: Tracker, store: Store, contender: Contender) -> RegisteredModel:
    """Move the alias to a version that passes the gate and beats the champion; else return why it stays."""
    name, version = contender.model, contender.version
    blockers = list(contender.blockers)
    try:
        champion = tracker.find_alias(name, CHAMPION)
        if champion is not None and champion.version == version:
            return RegisteredModel(model=name, version=version, is_champion=True)
        if champion is not None and not blockers:
            blockers = find_weaknesses(store, contender, champion)
        if not blockers:
            tracker.set_alias(name, CHAMPION, version)
    except ServiceUnavailable as error:  # the model is registered; its alias can be moved later
        blockers.append(str(error))
    return RegisteredModel(model=name, version=version, is_champion=not blockers, blockers=tuple(blockers))


def find_weaknesses(store: Store, contender: Contender, champion: Version) -> list[str]:
    """Return why a version does not beat the champion, by the paired comparison of DINO and CLIP-T."""
    from tasks.evaluation.comparison import compare

    held = f"version {champion.version}, the champion"
    keys = {stage: champion.tags.get(f"likeness.{stage}", "") for stage in ("evaluation", "subject", "scoring")}
    try:
        found = compare(
            [
                load_evaluated(store, held, keys),
                load_evaluated(store, f"version {contender.version}", contender.keys),
            ]
        )
    except ConfigError as error:
        return [f"it cannot be compared with {held}: {error}"]
    differences = {row.key: row.differences[0] for row in found.metrics}
    dino, clip_t = differences["dino"], differences["clip_t"]
    is_better = [d.low is not None and d.low > 0 for d in (dino, clip_t)]
    is_worse = [d.high is not None and d.high < 0 for d in (dino, clip_t)]
    if any(is_better) and not any(is_worse):
        return []
    told = f"DINO {dino.show_gain()}, CLIP-T {clip_t.show_gain()}"
    return [f"it is not shown to be better than {held}: {told}"]


def load_evaluated(store: Store, name: str, keys: Mapping[str, str]) -> "Candidate":
    """Return an evaluation with its grades, by the keys of its stages. Raises ConfigError for missing manifests."""
    from tasks.evaluation.comparison import Candidate

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
