"""Which registered model is the champion of its subject: the alias moves where the gate and a comparison allow it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.errors import ArtifactCorrupt, ConfigError, LikenessError, first_line
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
FORCE = "promote with --force"


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
        while True:
            if champion is not None and champion.version == version:
                return RegisteredModel(model=name, version=version, is_champion=True)
            if champion is not None and not blockers:
                blockers = find_weaknesses(store, contender, champion)
            # A comparison takes seconds, in which another run may have become the champion.
            held, champion = champion, tracker.find_alias(name, CHAMPION)
            if blockers or find_version(held) == find_version(champion):
                break
        if not blockers:
            tracker.set_alias(name, CHAMPION, version)
    except (LikenessError, OSError) as error:  # the model is registered; its alias can be moved later
        blockers.append(f"the promotion failed: {first_line(error)}")
    return RegisteredModel(model=name, version=version, is_champion=not blockers, blockers=tuple(blockers))


def find_version(champion: Version | None) -> str | None:
    """Return the champion's version; None where there is no champion."""
    return None if champion is None else champion.version


def find_weaknesses(store: Store, contender: Contender, champion: Version) -> list[str]:
    """Return why a version does not beat the champion, by the paired comparison of DINO and CLIP-T."""
    from tasks.evaluation.comparison import UnpairedError, compare, is_better

    held = f"version {champion.version}, the champion"
    keys = {stage: champion.tags.get(f"likeness.{stage}", "") for stage in ("evaluation", "subject", "scoring")}
    own = load_evaluated(store, f"version {contender.version}", contender.keys)
    try:
        reference = load_evaluated(store, held, keys)
    except (ConfigError, ArtifactCorrupt):
        return [f"{held}, has no samples in the store to compare with; {FORCE}"]
    refusal = find_mismatch(own, reference)
    if refusal:
        return [refusal]
    try:
        found = compare([reference, own])
    except UnpairedError:
        return [f"{held}, was evaluated with other prompts or seeds; {FORCE}"]
    except ConfigError as error:
        return [f"it cannot be compared with {held}: {error}; {FORCE}"]
    differences = {row.key: row.differences[0] for row in found.metrics}
    if is_better(differences):
        return []
    details = f"DINO {differences['dino'].show_gain()}, CLIP-T {differences['clip_t'].show_gain()}"
    return [f"no significant improvement over the champion (version {champion.version}): {details}"]


def find_mismatch(own: "Candidate", champion: "Candidate") -> str:
    """Return why two evaluations have no common scale; empty where they have."""
    from tasks.evaluation.comparison import find_other_settings

    if own.photos != champion.photos:
        return f"{champion.name}, was tuned on other photos; {FORCE}, or set tracking.registered_model for this subject"
    one, other = own.evaluation.protocol, champion.evaluation.protocol
    if not (one.encoders and other.encoders):
        older = f"{champion.name}," if one.encoders else own.name
        return f"{older} was evaluated by an earlier version of likeness; run it again, or {FORCE}"
    if one == other:
        return ""
    encoders = ["evaluation.encoders"] if one.encoders != other.encoders else []
    details = ", ".join([*encoders, *find_other_settings(one, other)])
    return f"{champion.name}, was evaluated with other encoders or sampling settings ({details}); {FORCE}"


def load_evaluated(store: Store, name: str, keys: Mapping[str, str]) -> "Candidate":
    """Return an evaluation with its grades, by the keys of its stages. Raises ConfigError for missing manifests."""
    from tasks.evaluation.comparison import Candidate

    evaluation = find_manifest(store, Evaluation, stage="evaluation", key=keys["evaluation"])
    subject = find_manifest(store, SubjectSet, stage="subject", key=keys["subject"])
    if evaluation is None or subject is None:
        raise ConfigError(f"the samples of {name} are missing from the store; run it again")
    scores = None
    if "scoring" in keys:
        scores = find_manifest(store, Scorecard, stage="scoring", key=keys["scoring"])
    graded = scores.judgements if scores else ()
    return Candidate(
        name,
        evaluation,
        frozenset(image.source_sha256 for image in subject.images),
        {axis: {each.sample.key: getattr(each, axis) for each in graded} for axis in SideScores.model_fields},
        # Grades with and without evidence before them are no common scale.
        f"{scores.served_model}, evidence {scores.evidence}" if scores else "",
    )
