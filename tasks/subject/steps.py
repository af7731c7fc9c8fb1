"""The subject stage: photos in, instance images with captions and QC out."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import task

from tasks.manifests.subject import RejectedImage, SubjectSet
from tasks.services.llm.config import LlmConfig
from tasks.stage.cache import StageFolder, store_reasoning
from tasks.stage.context import Runtime
from tasks.stage.states import finished
from tasks.subject.config import SubjectConfig

STAGE_VERSION = 5


@task(name="check photos", persist_result=False)
def check_photos(config: SubjectConfig, runtime: Runtime, *, is_drawn_world: bool) -> Any:
    """Decode, measure and compare the photos before anything is paid for or computed.

    Raises:
        SubjectRejected: too few good ones, or they are not of the only world that the base model knows.

    """
    from tasks.subject.photos import ingest as intake
    from tasks.subject.photos.known_world import check_known_world

    photos = intake.check_photos(config, runtime.store)
    for name, reason in photos.skipped:
        runtime.progress.note(f"warning: {name} is not read: {reason}")
    if not is_drawn_world:
        return photos
    return replace(photos, unknown_world=check_known_world(photos.accepted, config, runtime.store))


@task(name="subject", persist_result=False)
def prepare_subject(config: SubjectConfig, llm: LlmConfig, photos: Any, runtime: Runtime) -> Any:
    """Inspect and caption the photos; keep rejects with their reasons."""
    from tasks.subject.captions.captioning import digest_prompts

    settings = config.model_dump(
        mode="json",
        exclude={"source", "max_images", "captions", "batch_threshold", "max_wait_seconds", "allow_unknown"},
    )
    captions = hashlib.sha256(Path(config.captions).read_bytes()).hexdigest() if config.captions else ""
    models = [digest_prompts(), *(llm.identity(role) for role in ("inspector", "captioner", "profiler", "adjudicator"))]
    is_asked = config.captioning == "llm"
    manifest = runtime.run_stage(
        SubjectSet,
        "subject",
        version=STAGE_VERSION,
        settings=[settings, captions, models if is_asked else [], photos.unknown_world],
        inputs=photos.digests(),
        compute=lambda folder: compute_subject(folder, config, photos, runtime),
    )
    for warning in filter(None, (manifest.unknown_world, *manifest.warnings)):
        runtime.progress.note(f"warning: {warning}")
    return finished(manifest, runtime)


def compute_subject(folder: StageFolder, config: SubjectConfig, photos: Any, runtime: Runtime) -> SubjectSet:
    """Ask the LLM about the photos, sort out, and write the manifest. Raises SubjectRejected."""
    from tasks.subject.captions.captioning import describe_photos
    from tasks.subject.name_lookup import look_up_names
    from tasks.subject.photos import ingest as intake
    from tasks.subject.selection import check_leaks, profile_subject, sort_photos

    ledger, first_row = runtime.llm.ledger, len(runtime.llm.ledger.rows)
    described = describe_photos(
        photos,
        config,
        llm=runtime.llm,
        state_prefix=f"{folder.prefix}/batches",
        on_progress=runtime.show("inspection and captions"),
    )
    overview = profile_subject(photos, config, llm=runtime.llm) if config.captioning == "llm" else None
    warnings, sources = look_up_names(config, llm=runtime.llm)
    sorted_photos = sort_photos(folder, photos.accepted, described, config, overview)
    rejected = [store_reject(folder, reject) for reject in photos.rejected] + sorted_photos.rejected
    left_out = [(r.source_name, r.reason) for r in [*rejected, *sorted_photos.quarantined]]
    intake.require_enough(len(sorted_photos.images), config, left_out)
    check_leaks(sorted_photos, config)
    reasoning = {photo.name: described[photo.sha256].reasoning for photo in photos.accepted}
    return folder.finish(
        SubjectSet,
        version=STAGE_VERSION,
        cost_usd=ledger.sum_cost(since=first_row),
        counts={
            "photos": len(sorted_photos.images),
            "rejected": len(rejected),
            "quarantined": len(sorted_photos.quarantined),
            "llm_calls": ledger.count_calls(since=first_row),
        },
        class_noun=config.class_noun,
        identifier_token=config.identifier_token,
        images=tuple(sorted_photos.images),
        rejected=tuple(rejected),
        quarantined=tuple(sorted_photos.quarantined),
        traits=tuple(sorted_photos.traits),
        leaks=tuple(sorted_photos.leaks),
        warnings=(*sorted_photos.warnings, *warnings),
        unknown_world=photos.unknown_world,
        sources=sources,
        reasoning=store_reasoning(folder, reasoning),
    )


def store_reject(folder: StageFolder, reject: Any) -> RejectedImage:
    """Keep a rejected photo's reason, and a small picture where it could be decoded."""
    name = f"rejected/{reject.sha256[:16]}.png"
    return RejectedImage(
        source_name=reject.name,
        source_sha256=reject.sha256,
        reason=reject.reason,
        thumbnail=folder.put(name, reject.thumbnail) if reject.thumbnail else None,
    )
