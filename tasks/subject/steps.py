"""The subject stage: photos in, instance images with captions and QC out."""

from typing import Any

from prefect import task

from tasks.contract import StageFolder
from tasks.manifests import InstanceImage, RejectedImage, SubjectSet
from tasks.prefect_states import finished, should_retry
from tasks.runtime import Runtime
from tasks.services.llm.config import LlmConfig
from tasks.subject.config import SubjectConfig

STAGE_VERSION = 2


@task(name="check photos", persist_result=False)
def check_photos(config: SubjectConfig, runtime: Runtime) -> Any:
    """Decode, measure and compare the photos before anything is paid for."""
    from tasks.subject import intake

    return intake.check_photos(config, runtime.store)


@task(name="subject", persist_result=False, retries=1, retry_delay_seconds=3, retry_condition_fn=should_retry)
def prepare_subject(config: SubjectConfig, llm: LlmConfig, photos: Any, runtime: Runtime) -> Any:
    """Inspect and caption the photos; keep rejects with their reasons."""
    settings = config.model_dump(mode="json", exclude={"source", "max_images"})
    models = [llm.identity(role) for role in ("inspector", "captioner")]
    is_asked = config.captioning == "llm"
    manifest = runtime.run_stage(
        SubjectSet,
        "subject",
        version=STAGE_VERSION,
        settings=[settings, models if is_asked else []],
        inputs=photos.digests(),
        compute=lambda folder: compute_subject(folder, config, photos, runtime),
    )
    return finished(manifest, runtime)


def compute_subject(folder: StageFolder, config: SubjectConfig, photos: Any, runtime: Runtime) -> SubjectSet:
    """Ask the LLM about every photo, sort out, and write the manifest. Raises SubjectRejected."""
    from tasks.subject import captioning, intake

    first_row = len(runtime.llm.ledger.rows)
    described = {}
    if config.captioning == "llm":
        described = captioning.describe_photos(photos, config, llm=runtime.llm, on_progress=runtime.show("captions"))
    images, rejected = [], [store_reject(folder, reject) for reject in photos.rejected]
    for photo in photos.accepted:
        inspection, caption = described.get(photo.sha256, (None, None))
        objection = captioning.find_objection(inspection, config) if inspection else None
        if objection:
            thumbnail = folder.put(f"rejected/{photo.sha256[:16]}.png", photo.png)
            rejected.append(
                RejectedImage(source_name=photo.name, source_sha256=photo.sha256, reason=objection, thumbnail=thumbnail)
            )
            continue
        images.append(
            InstanceImage(
                image=folder.put(f"images/{photo.sha256[:16]}.png", photo.png),
                source_sha256=photo.sha256,
                measures=photo.measures,
                inspection=inspection.model_dump() if inspection else {},
                caption=captioning.write_caption(caption, config) if caption else "",
                instance_prompt=captioning.write_instance_prompt(caption, config),
                mask=folder.put(f"masks/{photo.sha256[:16]}.png", photo.mask_png) if photo.mask_png else None,
            )
        )
    intake.require_enough(len(images), config, [(r.source_name, r.reason) for r in rejected])
    ledger = runtime.llm.ledger
    return folder.finish(
        SubjectSet,
        version=STAGE_VERSION,
        cost_usd=ledger.sum_cost(since=first_row),
        counts={"photos": len(images), "rejected": len(rejected), "llm_calls": ledger.count_calls(since=first_row)},
        class_noun=config.class_noun,
        identifier_token=config.identifier_token,
        images=tuple(images),
        rejected=tuple(rejected),
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
