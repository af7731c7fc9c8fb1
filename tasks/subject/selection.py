"""Select the photos to train on and write their prompts; reject or quarantine the others."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from tasks.errors import ReplyInvalid, SubjectRejected
from tasks.manifests.subject import InstanceImage, RejectedImage
from tasks.services.llm.service import LlmService
from tasks.stage.cache import StageFolder
from tasks.subject.captions.captioning import PhotoAnnotation, lint_caption, write_caption, write_instance_prompt
from tasks.subject.captions.linting import clean_phrase, list_trait_words
from tasks.subject.config import SubjectConfig
from tasks.subject.photos.ingest import CheckedPhotos, Photo
from tasks.subject.subject_profile import Overview, ask_profile, find_warnings

log = logging.getLogger(__name__)

USUAL_LEAK_SHARE = 0.5  # above it, a run that `max_leak_fraction` permits warns


@dataclass
class Selection:
    """The outcome of the subject stage before its manifest is written."""

    images: list[InstanceImage] = field(default_factory=list)
    rejected: list[RejectedImage] = field(default_factory=list)
    quarantined: list[RejectedImage] = field(default_factory=list)
    traits: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def profile_subject(photos: CheckedPhotos, config: SubjectConfig, *, llm: LlmService) -> Overview | None:
    """Return the profile of all photos, or None where it is disabled or fails: it is advisory."""
    if not config.is_profiled:
        return None
    try:
        return ask_profile(list(photos.accepted), config, llm=llm)
    except ReplyInvalid as error:
        log.warning("no profile of the subject: %s", error)
        return None


def select_photos(
    folder: StageFolder,
    photos: Sequence[Photo],
    described: dict[str, PhotoAnnotation],
    *,
    config: SubjectConfig,
    overview: Overview | None,
) -> Selection:
    """Sort photos by their annotations into instance images, rejects (unfit) and quarantine (no usable reply)."""
    outcome = Selection()
    if overview is not None:
        # A model's words: cleaned and bounded before they enter prompts and report.
        outcome.traits = [clean_phrase(trait) for trait in overview.profile.invariant_traits[:20]]
        outcome.warnings = find_warnings(overview.profile, config)
    trait_words = list_trait_words(outcome.traits, class_noun=config.class_noun)
    for photo in photos:
        found = described.get(photo.sha256, PhotoAnnotation())
        objection = found.find_objection(config)
        if found.problem or objection:
            reason = (
                f"no usable reply ({clean_phrase(found.problem, max_words=20)})" if found.problem else str(objection)
            )
            thumbnail = folder.put(f"rejected/{photo.sha256[:16]}.png", photo.png)
            aside = RejectedImage(
                source_name=photo.name, source_sha256=photo.sha256, reason=reason, thumbnail=thumbnail
            )
            (outcome.quarantined if found.problem else outcome.rejected).append(aside)
            continue
        caption = found.caption
        if caption is not None and found.inspection is not None:  # human captions have no inspection; not linted
            caption, leaks, foreign = lint_caption(caption, trait_words, config)
            if leaks:
                outcome.leaks.append(f"{photo.name}: {', '.join(leaks)}")
            if foreign:
                outcome.warnings.append(
                    f"{photo.name}: a caption phrase named another subject ({', '.join(foreign)}) and is left out"
                )
        outcome.images.append(
            InstanceImage(
                image=folder.put(f"images/{photo.sha256[:16]}.png", photo.png),
                source_name=photo.name,
                source_sha256=photo.sha256,
                measures=photo.measures,
                inspection=note_inspection(found),
                caption=write_caption(caption, config) if caption else "",
                surroundings=clean_phrase(caption.surroundings) if caption else "",
                view=clean_phrase(caption.view) if caption else "",
                instance_prompt=write_instance_prompt(caption, config),
                mask=folder.put(f"masks/{photo.sha256[:16]}.png", photo.mask_png) if photo.mask_png else None,
                # Training centers its crops here where there is no mask.
                focus=found.inspection.subject_box.find_center() if found.inspection else None,
            )
        )
    select_top_images(outcome, config, best=overview.best if overview else ())
    return outcome


def select_top_images(outcome: Selection, config: SubjectConfig, *, best: Sequence[str]) -> None:
    """Keep at most `subject.max_trained` images: the profiler's choice in its order, then the sharpest."""
    if config.max_trained is None or len(outcome.images) <= config.max_trained:
        return
    ranks = {sha256: rank for rank, sha256 in enumerate(best)}
    # The digest breaks ties, so that file names don't affect the selection.
    ranked = sorted(
        outcome.images, key=lambda i: (ranks.get(i.source_sha256, len(ranks)), -i.measures.sharpness, i.source_sha256)
    )
    kept = {image.source_sha256 for image in ranked[: config.max_trained]}
    for image in outcome.images:
        if image.source_sha256 not in kept:
            reason = f"good, but not among the best {config.max_trained} (subject.max_trained)"
            outcome.rejected.append(
                RejectedImage(
                    source_name=image.source_name,
                    source_sha256=image.source_sha256,
                    reason=reason,
                    thumbnail=image.image,
                )
            )
    # In their original order: training refers to images by index.
    outcome.images = [image for image in outcome.images if image.source_sha256 in kept]


def note_inspection(found: PhotoAnnotation) -> dict[str, str | bool]:
    """Return the findings of inspector and adjudicator for the manifest."""
    facts: dict[str, str | bool] = found.inspection.model_dump(exclude={"subject_box"}) if found.inspection else {}
    if found.adjudication is not None:
        facts["adjudication"] = clean_phrase(found.adjudication.evidence, max_words=40)
    return facts


def check_leaks(outcome: Selection, config: SubjectConfig) -> None:
    """Refuse to train where too many captions name invariant traits: the captioner did not follow its instructions."""
    share = len(outcome.leaks) / max(1, len(outcome.images))
    if share > config.max_leak_fraction:
        raise SubjectRejected(
            f"{len(outcome.leaks)} of {len(outcome.images)} captions name invariant traits ({outcome.leaks[0]}); "
            "choose another captioner, or set subject.captioning=template, or subject.max_leak_fraction=1"
        )
    if share > USUAL_LEAK_SHARE:
        outcome.warnings.append(
            f"{len(outcome.leaks)} of {len(outcome.images)} captions name invariant traits; trained anyway, "
            f"as subject.max_leak_fraction={config.max_leak_fraction:g} says"
        )
