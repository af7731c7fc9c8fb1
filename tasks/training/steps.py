"""The training stage: a supervised worker process fine-tunes the base model."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.client.schemas.objects import State

from tasks import diffusion as diffusion_code
from tasks.diffusion.config import DiffusionConfig
from tasks.manifests.base import ModelRef, ObjectRef
from tasks.manifests.prior import ClassImageSet
from tasks.manifests.subject import InstanceImage, SubjectSet
from tasks.manifests.training import PhotoCrops, TunedModel
from tasks.services.store.base import Store
from tasks.services.tracking.base import DatasetInfo
from tasks.stage.cache import PREFIXES, Stage, StageFolder, fetch_folder, find_manifest
from tasks.stage.context import Runtime
from tasks.stage.states import finished, host_slots
from tasks.training.config import TrainingConfig
from tasks.training.data.holdout import resolve_validation, split_photos
from tasks.training.inputs import STAGE_VERSION, TrainingInputs

if TYPE_CHECKING:
    from tasks.diffusion.external.detection import ExternalModel
    from tasks.training.process.worker_spec import TrainingImage, TrainingSpec, WorkerResult

TRAINING_TAG = "likeness.training"


@task(name="training", persist_result=False)
def fine_tune(inputs: TrainingInputs, runtime: Runtime) -> State[TunedModel]:
    """Fine-tune, resuming from the checkpoint of an earlier attempt.

    Called, not submitted, by the flow: only the main thread receives signals.
    """
    # Resolved before the key is computed: number of devices, held-out photos and metric are part of it.
    config = resolve_validation(resolve_devices(inputs.config), len(inputs.subject.images), runtime.progress.note)
    inputs = inputs.with_config(config)
    manifest = runtime.run_stage(inputs.stage(), lambda folder: compute_training(folder, inputs, runtime))
    return finished(manifest, runtime)


def resolve_devices(config: TrainingConfig) -> TrainingConfig:
    """Resolve `num_devices=0` to the number of local GPUs, at least 1."""
    if config.num_devices:
        return config
    from tasks.diffusion.device import count_gpus

    return config.model_copy(update={"num_devices": count_gpus()})


def compute_training(folder: StageFolder, inputs: TrainingInputs, runtime: Runtime) -> TunedModel:
    """Run the worker and move its result into the store, under an exclusive lock per stage key."""
    from tasks.diffusion.device import count_slots, list_devices, lock_devices
    from tasks.training.data.latent_cache import fetch_latents, store_latents
    from tasks.training.process.remote_checkpoints import CheckpointUploader, RemoteCheckpoints
    from tasks.training.process.supervisor import locked, run_worker
    from tasks.training.process.worker_spec import RunFolder

    work = runtime.work_folder / "training" / folder.stage_key
    with locked(work.with_suffix(".lock")) as lock_descriptor:
        # Checked under the lock: another process may have trained this model while we waited.
        finished_meanwhile = find_manifest(runtime.store, TunedModel, stage="training", key=folder.stage_key)
        if finished_meanwhile is not None:
            return finished_meanwhile
        spec = make_spec(inputs, runtime, stage_key=folder.stage_key, work=work)
        num_cached = fetch_latents(runtime.store, spec)
        runtime.live.begin(
            tags={TRAINING_TAG: folder.stage_key},
            stale_tag=TRAINING_TAG,
            datasets=describe_datasets(inputs.subject, inputs.prior),
        )
        remote = RemoteCheckpoints(runtime.store, folder.prefix, RunFolder(work))
        step = remote.fetch()
        if step is not None:
            runtime.progress.note(f"training: fetched the checkpoint of step {step} from the store")
        names = list_devices(inputs.config.num_devices, inputs.diffusion)
        with (
            lock_devices(names, on_wait=runtime.wait_note("training")) as gpus,
            host_slots(count_slots(names), on_wait=runtime.wait_note("training")),
            CheckpointUploader(remote, inputs.config, check=folder.check_lease) as uploader,
        ):

            def on_event(event: dict[str, Any]) -> None:
                show_event(event, inputs.config, runtime)
                if event["event"] == "checkpoint":
                    uploader.notify()

            result = run_worker(spec, on_event=on_event, inherited=(lock_descriptor, *gpus), check=folder.check_lease)
        manifest = store_result(folder, inputs, spec, result=result, num_cached_latents=num_cached)
        store_latents(runtime.store, spec)
        # Last: until the manifest is stored, checkpoints and result are needed to resume.
        remote.delete_all()
        shutil.rmtree(work)
    return manifest


def make_spec(inputs: TrainingInputs, runtime: Runtime, *, stage_key: str, work: Path) -> "TrainingSpec":
    """Return the worker's spec, with all images as local files below `work`."""
    from tasks.diffusion.hub import find_folder
    from tasks.training.process.worker_spec import TrainingSpec

    config, subject, prior = inputs.config, inputs.subject, inputs.prior
    num_holdout = config.validation.num_holdout or 0
    photos, held_out = split_photos(subject.images, num_holdout, key=lambda image: image.source_sha256)
    local = LocalImages(runtime.store, work / "data")
    class_images = prior.images if inputs.uses_class_images else ()
    return TrainingSpec(
        stage_key=stage_key,
        folder=str(work),
        latent_folder=str(runtime.work_folder / "latents"),  # outside `work`, which is removed at the end
        model_folder=str(find_folder(inputs.diffusion)),
        base_model_sha256=prior.base_model.sha256,
        seed=inputs.seed,
        identifier_token=subject.identifier_token,
        class_noun=subject.class_noun,
        diffusion=inputs.diffusion,
        training=config,
        encoders=inputs.encoders,
        instance_images=tuple(map(local.fetch_photo, photos)),
        holdout_images=tuple(map(local.fetch_photo, held_out)),
        class_images=tuple(local.fetch(image.image, prompt=prior.class_prompt) for image in class_images),
    )


class LocalImages:
    """Downloads stored images, verified, to a local folder."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.folder = folder

    def fetch_photo(self, photo: InstanceImage) -> "TrainingImage":
        """Download a photo and its mask."""
        mask = {"mask_path": self.copy(photo.mask), "mask_sha256": photo.mask.sha256} if photo.mask else {}
        return self.fetch(
            photo.image,
            prompt=photo.instance_prompt,
            focus=photo.focus,
            original_width=photo.measures.width,
            original_height=photo.measures.height,
            **mask,
        )

    def fetch(self, ref: ObjectRef, *, prompt: str, **fields: Any) -> "TrainingImage":
        """Download an image and read its size."""
        from PIL import Image

        from tasks.training.process.worker_spec import TrainingImage

        path = self.copy(ref)
        with Image.open(path) as opened:
            width, height = opened.size
        return TrainingImage(path=path, width=width, height=height, sha256=ref.sha256, prompt=prompt, **fields)

    def copy(self, ref: ObjectRef) -> str:
        """Download one object and return its local path."""
        # Keys are `<prefix>/<stage key>/<path>`; `below` is the stage key.
        fetch_folder(self.store, [ref], below=ref.key.split("/")[1], folder=self.folder)
        return str(self.folder / ref.key.split("/", 2)[2])


def describe_datasets(subject: SubjectSet, prior: ClassImageSet) -> list[DatasetInfo]:
    """Return photos and class images as datasets of the tracking server."""
    return [
        DatasetInfo(
            name=manifest.stage,
            digest=manifest.compute_content_digest(),
            source=f"{PREFIXES[manifest.stage]}/{manifest.stage_key}",
            context="training",
        )
        for manifest in (subject, prior)
    ]


def show_event(event: dict[str, Any], config: TrainingConfig, runtime: Runtime) -> None:
    """Translate a worker event into progress and live metrics, and count the steps of this run."""
    if event["event"] == "started":
        runtime.first_training_step = event["step"]
        if event["step"]:  # 0: a fresh start
            runtime.progress.note(f"training resumes from its checkpoint at step {event['step']}")
    elif event["event"] == "note":
        runtime.progress.note(event["text"])
    elif event["event"] == "step":
        runtime.num_training_steps = event["step"] - runtime.first_training_step
        runtime.live.log_metrics(
            (f"train/{name}", float(value), int(event["step"]))
            for name, value in event.items()
            if name not in ("event", "step") and isinstance(value, int | float)  # None marks a non-finite value
        )
        loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
        detail = f"loss {loss}  {event['images_per_second']:.1f} images/s"
        runtime.progress.update("training", event["step"], config.max_train_steps, detail=detail)


def store_result(
    folder: StageFolder,
    inputs: TrainingInputs,
    spec: "TrainingSpec",
    *,
    result: "WorkerResult",
    num_cached_latents: int,
) -> TunedModel:
    """Store weights, candidates, samples and loss log, then write the manifest."""
    from tasks.diffusion.device import describe_machine
    from tasks.training.process.worker_spec import RunFolder

    run = RunFolder(spec.path)
    model = tuple(folder.put_file(f"model/{name}", run.model / name) for name in result.model_files())
    folder.put("losses.jsonl", run.losses.read_bytes())  # a copy: a later attempt writes into the file
    for path in list_files(run.candidates.rglob("*")):
        folder.put_file(path.relative_to(run.folder).as_posix(), path)
    for path in list_files(run.samples.glob("*.png")):
        folder.put(f"samples/{path.name}", path.read_bytes())
    return folder.finish(
        TunedModel(
            **folder.head(STAGE_VERSION, counts=count_training(spec, result, num_cached_latents=num_cached_latents)),
            base_model=inputs.prior.base_model,
            model=model,
            num_steps=result.num_steps,
            published_step=result.published_step,
            family=spec.diffusion.family,
            method=spec.training.method,
            trainable_parameters=result.trainable_parameters,
            total_parameters=result.total_parameters,
            final_loss=result.final_loss,
            peak_memory_bytes=result.peak_memory_bytes,
            subject_sha256=inputs.subject.compute_content_digest(),
            prior_sha256=inputs.prior.compute_content_digest(),
            crops=list_crops(inputs.subject, spec),
            machine=describe_machine(result.device, num_devices=spec.training.world_size),
        )
    )


def list_crops(subject: SubjectSet, spec: "TrainingSpec") -> tuple[PhotoCrops, ...]:
    """Return the crops of every photo that was trained on."""
    from tasks.training.data.preprocessing import locate_crops

    boxes = locate_crops(spec)
    photos = [image.image for image in subject.images if image.image.sha256 in boxes]
    return tuple(PhotoCrops(photo=photo, boxes=boxes[photo.sha256]) for photo in photos)


def count_training(spec: "TrainingSpec", result: "WorkerResult", *, num_cached_latents: int) -> dict[str, int]:
    """Return what the manifest counts: steps, and what differs from the configuration or isn't in it."""
    counts = {"steps": result.num_steps, "resumed_from_step": result.start_step}
    if num_cached_latents:  # images
        counts["cached_latents"] = num_cached_latents
    if spec.holdout_images:
        counts["held_out"] = len(spec.holdout_images)
    if result.micro_batch_size != spec.training.train_batch_size:
        counts["micro_batch_size"] = result.micro_batch_size
    if spec.training.world_size > 1:  # the configuration may say 0: all GPUs of whichever machine
        counts["world_size"] = spec.training.world_size
    return counts


def list_files(paths: Iterable[Path]) -> list[Path]:
    """Return the regular files among the paths, sorted."""
    return sorted(path for path in paths if path.is_file())


@dataclass(frozen=True)
class ImportInputs:
    """A model that another trainer made, and the base model that it is for."""

    location: str
    diffusion: DiffusionConfig
    base_model: ModelRef
    subject: SubjectSet

    def stage(self, external: "ExternalModel") -> Stage[TunedModel]:
        """Return the stage that imports it."""
        # Adapters are loaded, and so rounded, in the base model's precision.
        diffusion = self.diffusion.model_dump(mode="json", include={"family", "resolution", "precision"})
        # An embedding is stored under the identifier token.
        token = self.subject.identifier_token if external.kind == "textual_inversion" else ""
        settings = ["external", diffusion_code.VERSION, diffusion, token]
        inputs = (self.base_model.sha256, external.compute_digest())
        return Stage("training", TunedModel, STAGE_VERSION, settings=settings, inputs=inputs)


@task(name="import model", persist_result=False)
def import_model(inputs: ImportInputs, runtime: Runtime) -> State[TunedModel]:
    """Bring a model of another trainer into the store, in place of a trained one.

    Raises:
        ConfigError: it is for another family, or a part of it is missing, a pickle, or doesn't load.

    """
    from tasks.diffusion.external.detection import detect

    external = detect(inputs.location)
    stage = inputs.stage(external)
    manifest = runtime.run_stage(stage, lambda folder: store_external(folder, inputs, external, runtime=runtime))
    return finished(manifest, runtime)


def store_external(
    folder: StageFolder, inputs: ImportInputs, external: "ExternalModel", *, runtime: Runtime
) -> TunedModel:
    """Convert and store a model, then write the manifest; counts and losses of its training are not known."""
    from tasks.diffusion.external.conversion import convert

    local = runtime.work_folder / "external" / folder.stage_key
    convert(external, inputs.diffusion, local, identifier_token=inputs.subject.identifier_token)
    names = [path.relative_to(local).as_posix() for path in list_files(local.rglob("*"))]
    model = tuple(folder.put_file(f"model/{name}", local / name) for name in names)
    manifest = folder.finish(
        TunedModel(
            **folder.head(STAGE_VERSION, counts={"files": len(model)}),
            base_model=inputs.base_model,
            model=model,
            num_steps=0,
            published_step=0,
            family=inputs.diffusion.family,
            method=f"external {external.kind}",
            trainable_parameters=0,
            total_parameters=0,
            final_loss=0.0,
            peak_memory_bytes=0,
            subject_sha256="",
            prior_sha256="",
        )
    )
    shutil.rmtree(local)
    return manifest
