"""The training stage: a supervised worker turns photos and class images into a tuned model."""

import shutil
from pathlib import Path
from typing import Any

from prefect import task

from tasks import diffusion as diffusion_code
from tasks import encoders as encoders_code
from tasks.diffusion.config import DiffusionConfig
from tasks.encoders.config import EncoderConfig
from tasks.encoders.folders import identify_encoders
from tasks.manifests.prior import ClassImageSet
from tasks.manifests.subject import InstanceImage, SubjectSet
from tasks.manifests.training import TunedModel
from tasks.services.tracking.base import DatasetInfo
from tasks.stage.cache import PREFIXES, StageFolder, fetch_folder, find_manifest
from tasks.stage.context import Runtime
from tasks.stage.states import finished
from tasks.training.config import TrainingConfig
from tasks.training.data.holdout import settle_validation, split_photos

STAGE_VERSION = 3
TRAINING_TAG = "likeness.training"


@task(name="training", persist_result=False)
def fine_tune(
    config: TrainingConfig,
    diffusion: DiffusionConfig,
    seed: int,
    subject: SubjectSet,
    prior: ClassImageSet,
    encoders: EncoderConfig,
    runtime: Runtime,
) -> Any:
    """Fine-tune, going on from a checkpoint where an earlier attempt left one.

    Called directly in the flow: signals reach only the main thread.
    """
    config = settle_validation(count_devices(config), len(subject.images), runtime.progress.note)
    resolution = diffusion.model_dump(mode="json", include={"family", "resolution"})
    measuring = [] if config.validation.metric == "loss" else [encoders.model_dump(), identify_encoders(encoders)]
    prior_digest = prior.compute_content_digest() if config.prior_loss_weight > 0 else ""
    manifest = runtime.run_stage(
        TunedModel,
        "training",
        version=STAGE_VERSION,
        settings=[diffusion_code.VERSION, encoders_code.VERSION, config.result_fields(), resolution, seed, *measuring],
        inputs=[prior.base_model.sha256, subject.compute_content_digest(), prior_digest],
        compute=lambda folder: compute_training(folder, config, diffusion, seed, subject, prior, encoders, runtime),
    )
    return finished(manifest, runtime)


def count_devices(config: TrainingConfig) -> TrainingConfig:
    """Return the configuration with the number of devices that `all` stands for here."""
    if config.num_devices:
        return config
    import torch

    return config.model_copy(update={"num_devices": max(1, torch.cuda.device_count())})


def compute_training(
    folder: StageFolder,
    config: TrainingConfig,
    diffusion: DiffusionConfig,
    seed: int,
    subject: SubjectSet,
    prior: ClassImageSet,
    encoders: EncoderConfig,
    runtime: Runtime,
) -> TunedModel:
    """Run the worker to its end and move its result into the store, one run at a time."""
    from tasks.diffusion.hub import find_folder
    from tasks.training.data.latent_cache import fetch_latents, keep_latents
    from tasks.training.process.supervisor import locked, run_worker
    from tasks.training.process.worker_spec import TrainingSpec

    work = runtime.work_folder / "training" / folder.stage_key
    num_holdout = config.validation.num_holdout or 0
    photos, held = split_photos(subject.images, num_holdout, key=lambda image: image.source_sha256)
    with locked(work.with_suffix(".lock")) as lock_descriptor:
        finished_meanwhile = find_manifest(runtime.store, TunedModel, "training", folder.stage_key)
        if finished_meanwhile is not None:
            return finished_meanwhile
        spec = TrainingSpec(
            stage_key=folder.stage_key,
            folder=str(work),
            latent_folder=str(runtime.work_folder / "latents"),
            model_folder=str(find_folder(diffusion)),
            base_model_sha256=prior.base_model.sha256,
            seed=seed,
            identifier_token=subject.identifier_token,
            class_noun=subject.class_noun,
            diffusion=diffusion,
            training=config,
            encoders=encoders,
            instance_images=fetch_images(runtime, work, list_rows(photos)),
            holdout_images=fetch_images(runtime, work, list_rows(held)),
            class_images=fetch_images(
                runtime, work, [(i.image, None, None, prior.class_prompt, None) for i in prior.images]
            )
            if config.prior_loss_weight > 0
            else (),
        )
        fetch_latents(runtime.store, spec)
        runtime.live.begin(
            tags={TRAINING_TAG: folder.stage_key}, stale_tag=TRAINING_TAG, datasets=describe_datasets(subject, prior)
        )
        result = run_worker(
            spec, on_event=lambda event: show_event(event, config, runtime), inherited=(lock_descriptor,)
        )
        manifest = store_result(folder, spec, result, subject, prior)
        keep_latents(runtime.store, spec)
        shutil.rmtree(work)
    return manifest


def describe_datasets(subject: SubjectSet, prior: ClassImageSet) -> list[DatasetInfo]:
    """Return photos and class images as a tracking server names data."""
    return [
        DatasetInfo(
            name=manifest.stage,
            digest=manifest.compute_content_digest(),
            source=f"{PREFIXES[manifest.stage]}/{manifest.stage_key}",
            context="training",
        )
        for manifest in (subject, prior)
    ]


def list_rows(images: list[InstanceImage]) -> list[tuple[Any, Any, Any, str, Any]]:
    """Return what is needed to train on photos."""
    return [(i.image, i.mask, i.focus, i.instance_prompt, i.measures) for i in images]


def fetch_images(runtime: Runtime, work: Path, rows: list[tuple[Any, Any, Any, str, Any]]) -> Any:
    """Copy images and their masks to local files and put them beside their prompts and original sizes."""
    from PIL import Image

    from tasks.training.process.worker_spec import TrainingImage

    def measure(path: str) -> dict[str, int]:
        with Image.open(path) as opened:
            return {"width": opened.width, "height": opened.height}

    def fetch(ref: Any) -> str:
        fetch_folder(runtime.store, [ref], below=ref.key.split("/")[1], folder=work / "data")
        return str(work / "data" / ref.key.split("/", 2)[2])

    return tuple(
        TrainingImage(
            path=(path := fetch(ref)),
            **measure(path),
            sha256=ref.sha256,
            prompt=prompt,
            mask_path=fetch(mask) if mask else "",
            mask_sha256=mask.sha256 if mask else "",
            focus=focus,
            original_width=measures.width if measures else 0,
            original_height=measures.height if measures else 0,
        )
        for ref, mask, focus, prompt, measures in rows
    )


def show_event(event: dict[str, Any], config: TrainingConfig, runtime: Runtime) -> None:
    """Turn the worker's events into progress and count the steps of this run."""
    if event["event"] == "started":
        runtime.first_training_step = event["step"]
        if event["step"]:
            runtime.progress.note(f"training goes on from its checkpoint at step {event['step']}")
    elif event["event"] == "note":
        runtime.progress.note(event["text"])
    elif event["event"] == "step":
        runtime.num_training_steps = event["step"] - runtime.first_training_step
        runtime.live.log_metrics(
            (f"train/{name}", float(value), int(event["step"]))
            for name, value in event.items()
            if name not in ("event", "step") and isinstance(value, int | float)
        )
        loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
        detail = f"loss {loss}  {event['images_per_second']:.1f} images/s"
        runtime.progress.update("training", event["step"], config.max_train_steps, detail)


def store_result(
    folder: StageFolder,
    spec: Any,
    result: Any,
    subject: SubjectSet,
    prior: ClassImageSet,
) -> TunedModel:
    """Store weights and loss log and write the manifest."""
    from tasks.training.process.worker_spec import RunFolder

    run, micro = RunFolder(spec.path), result.micro_batch_size
    model = tuple(folder.put_file(f"model/{name}", run.model / name) for name in result.model_files())
    folder.put("losses.jsonl", run.losses.read_bytes())  # a later attempt writes into the file
    for path in sorted(path for path in run.candidates.rglob("*") if path.is_file()):
        folder.put_file(path.relative_to(run.folder).as_posix(), path)
    for path in sorted(run.samples.glob("*.png")):
        folder.put(f"samples/{path.name}", path.read_bytes())
    return folder.finish(
        TunedModel,
        version=STAGE_VERSION,
        counts={
            "steps": result.num_steps,
            "resumed_from_step": result.start_step,
            **({"held_out": len(spec.holdout_images)} if spec.holdout_images else {}),
            **({"images_at_a_time": micro} if micro != spec.training.train_batch_size else {}),
        },
        base_model=prior.base_model,
        model=model,
        num_steps=result.num_steps,
        published_step=result.published_step,
        family=spec.diffusion.family,
        method=spec.training.method,
        trainable_parameters=result.trainable_parameters,
        total_parameters=result.total_parameters,
        final_loss=result.final_loss,
        peak_memory_bytes=result.peak_memory_bytes,
        subject_sha256=subject.compute_content_digest(),
        prior_sha256=prior.compute_content_digest(),
    )
