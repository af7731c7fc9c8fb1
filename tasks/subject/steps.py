"""The subject stage: photos in, instance images with captions and QC out."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import task
from prefect.client.schemas.objects import State

from tasks.manifests.subject import RejectedImage, SubjectSet
from tasks.services.llm.config import LlmConfig
from tasks.stage.cache import Stage, StageFolder, store_reasoning
from tasks.stage.context import Runtime
from tasks.stage.states import finished
from tasks.subject.config import SubjectConfig

if TYPE_CHECKING:
    from tasks.subject.photos.ingest import CheckedPhotos, Reject

STAGE_VERSION = 6
APPROVAL = {"approval", "approval_hours", "approval_on_timeout"}
# `source` and `captions` enter the key by content, `allow_unknown` through `unknown_world`; the others decide only how
# and when a result is reached.
NOT_RESULT = {"source", "max_images", "captions", "batch_threshold", "max_wait_seconds", "allow_unknown"} | APPROVAL
"""Settings that don't affect the result for given photos."""
ROLES = ("inspector", "captioner", "profiler", "adjudicator")


@dataclass(frozen=True)
class SubjectInputs:
    """Everything that a subject set depends on."""

    config: SubjectConfig
    llm: LlmConfig
    photos: "CheckedPhotos"

    def stage(self) -> Stage[SubjectSet]:
        """Return the stage with its cache key."""
        from tasks.subject.captions.captioning import digest_prompts

        config = self.config
        captions = hashlib.sha256(Path(config.captions).read_bytes()).hexdigest() if config.captions else ""
        # Without the LLM, neither prompts nor models affect the result.
        models = (
            [digest_prompts(), *(self.llm.fingerprint(role) for role in ROLES)] if config.captioning == "llm" else []
        )
        settings = config.model_dump(mode="json", exclude=NOT_RESULT)
        return Stage(
            "subject",
            SubjectSet,
            STAGE_VERSION,
            settings=[settings, captions, models, self.photos.unknown_world],
            inputs=tuple(self.photos.digests()),
        )


@task(name="check photos", persist_result=False)
def check_photos(config: SubjectConfig, runtime: Runtime, *, is_drawn_world: bool) -> "CheckedPhotos":
    """Decode, measure and deduplicate the photos before any LLM request or GPU work.

    Raises:
        SubjectRejected: too few good photos, or photos outside the domain of the shipped model.

    """
    from tasks.subject.photos import ingest
    from tasks.subject.photos.known_world import check_known_world

    photos = ingest.check_photos(config, runtime.store)
    for name, reason in photos.skipped:
        runtime.progress.note(f"warning: {name} is not read: {reason}")
    if not is_drawn_world:
        return photos
    return replace(photos, unknown_world=check_known_world(photos.accepted, config, runtime.store))


# No retries by Prefect: llm/retries.py retries each call, and a second layer would multiply the attempts.
@task(name="subject", persist_result=False)
def prepare_subject(inputs: SubjectInputs, runtime: Runtime) -> State[SubjectSet]:
    """Inspect and caption the photos; keep rejects with their reasons."""
    manifest = runtime.run_stage(inputs.stage(), lambda folder: compute_subject(folder, inputs, runtime))
    for warning in filter(None, (manifest.unknown_world, *manifest.warnings)):
        runtime.progress.note(f"warning: {warning}")
    return finished(manifest, runtime)


def compute_subject(folder: StageFolder, inputs: SubjectInputs, runtime: Runtime) -> SubjectSet:
    """Inspect, caption and select the photos, and write the manifest. Raises SubjectRejected."""
    from tasks.subject.captions.captioning import annotate_photos
    from tasks.subject.name_lookup import look_up_names
    from tasks.subject.photos.ingest import require_enough
    from tasks.subject.selection import check_leaks, profile_subject, select_photos

    config, photos = inputs.config, inputs.photos
    # The ledger spans the run; this stage's rows start here.
    ledger, first_row = runtime.llm.ledger, len(runtime.llm.ledger.rows)
    described = annotate_photos(
        photos,
        config,
        llm=runtime.llm,
        state_prefix=f"{folder.prefix}/batches",
        on_progress=runtime.progress_callback("inspection and captions"),
    )
    overview = profile_subject(photos, config, llm=runtime.llm) if config.captioning == "llm" else None
    warnings, sources = look_up_names(config, llm=runtime.llm)
    selection = select_photos(folder, photos.accepted, described, config=config, overview=overview)
    rejected = [store_reject(folder, reject) for reject in photos.rejected] + selection.rejected
    left_out = [(r.source_name, r.reason) for r in [*rejected, *selection.quarantined]]
    require_enough(len(selection.images), config, left_out)
    check_leaks(selection, config)
    reasoning = {photo.name: described[photo.sha256].reasoning for photo in photos.accepted}
    return folder.finish(
        SubjectSet(
            **folder.head(
                STAGE_VERSION,
                cost_usd=ledger.sum_cost(since=first_row),
                counts={
                    "photos": len(selection.images),
                    "rejected": len(rejected),
                    "quarantined": len(selection.quarantined),
                    "llm_calls": ledger.count_calls(since=first_row),
                },
            ),
            class_noun=config.class_noun,
            identifier_token=config.identifier_token,
            images=tuple(selection.images),
            rejected=tuple(rejected),
            quarantined=tuple(selection.quarantined),
            traits=tuple(selection.traits),
            leaks=tuple(selection.leaks),
            warnings=(*selection.warnings, *warnings),
            unknown_world=photos.unknown_world,
            sources=sources,
            reasoning=store_reasoning(folder, reasoning),
        )
    )


def store_reject(folder: StageFolder, reject: "Reject") -> RejectedImage:
    """Record a rejected photo with its reason, and a thumbnail where it could be decoded."""
    name = f"rejected/{reject.sha256[:16]}.png"
    return RejectedImage(
        source_name=reject.name,
        source_sha256=reject.sha256,
        reason=reject.reason,
        thumbnail=folder.put(name, reject.thumbnail) if reject.thumbnail else None,
    )
