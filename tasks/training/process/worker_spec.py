"""The immutable training spec that the supervisor passes to the worker as one JSON file."""

import math
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.config_base import Section
from tasks.diffusion.config import DiffusionConfig
from tasks.encoders.config import EncoderConfig
from tasks.stage.digests import digest, digest_file, dump_line
from tasks.stage.files import explain_full_disk
from tasks.training.config import TrainingConfig
from tasks.training.data.buckets import Size, choose_bucket

LATENTS_VERSION = 4  # of preprocessing and encoding
POLYNOMIAL_END = 1e-7  # diffusers' `lr_end`
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: saved on request; run again


class TrainingImage(Section):
    """One training image."""

    path: str
    width: int
    height: int
    sha256: str
    prompt: str
    mask_path: str = ""
    mask_sha256: str = ""
    focus: tuple[float, float] | None = Field(None, description="what a crop lies around where there is no mask")
    original_width: int = Field(0, description="width of the photo that this is a smaller copy of; 0: it is none")
    original_height: int = Field(0, description="height of that photo")

    def original_size(self) -> tuple[int, int]:
        """Return height and width of the original photo in pixels, as SDXL's `original_size`."""
        return self.original_height or self.height, self.original_width or self.width

    def content(self) -> list[object]:
        """Return the values that the image's latents depend on; the prompt is none of them."""
        return [self.sha256, self.mask_sha256, self.focus, self.original_size()]


class TrainingSpec(Section):
    """The complete input of the worker; it reads no other configuration."""

    stage_key: str
    folder: str = Field(description="run folder of the worker: checkpoints, logs, result")
    latent_folder: str = Field(description="where cached latents lie, shared by runs")
    model_folder: str = Field(description="diffusers folder of the base model")
    base_model_sha256: str
    seed: int
    identifier_token: str
    class_noun: str
    diffusion: DiffusionConfig
    training: TrainingConfig
    encoders: EncoderConfig | None = Field(None, description="needed where the best weights are the most similar")
    instance_images: tuple[TrainingImage, ...]
    class_images: tuple[TrainingImage, ...]
    holdout_images: tuple[TrainingImage, ...] = Field((), description="validated on, never trained on")

    @property
    def path(self) -> Path:
        """The run folder."""
        return Path(self.folder)

    def assign_buckets(self, kind: str = "instance") -> dict[Size, list[int]]:
        """Return image indices by bucket size; without bucketing all are in one square of `resolution`."""
        resolution, buckets = self.diffusion.resolution, dict[Size, list[int]]()
        for index, image in enumerate(self.holdout_images if kind == "holdout" else self.instance_images):
            size = Size(resolution, resolution)
            if self.training.aspect_ratio_bucketing:
                size = choose_bucket((image.width, image.height), resolution)
            buckets.setdefault(size, []).append(index)
        # Sorted, so that every rank and every resumed run builds the buckets in the same order.
        return dict(sorted(buckets.items()))

    def images_of(self, kind: str, size: Size) -> tuple[TrainingImage, ...]:
        """Return the images of a bucket. All class images are in every bucket, cropped to its size."""
        if kind == "class":
            return self.class_images
        images = self.holdout_images if kind == "holdout" else self.instance_images
        return tuple(images[index] for index in self.assign_buckets(kind)[size])

    def latents_paths(self) -> dict[Path, int]:
        """Return the latent cache files of instance, class and held-out images, each with its number of images."""
        kinds = ("instance", "class") if self.class_images else ("instance",)
        sets = [(kind, size) for kind in kinds for size in self.assign_buckets()]
        sets += [("holdout", size) for size in self.assign_buckets("holdout")]
        return {self.latents_path(kind, size): len(self.images_of(kind, size)) for kind, size in sets}

    def latents_path(self, kind: str, size: Size) -> Path:
        """Return the latent cache file of one set in one bucket, named by a digest of its inputs."""
        images, crops = self.images_of(kind, size), [0, False, 0]  # one centered, unflipped variant
        if kind == "instance":
            training = self.training
            # Without random crops, runs with other seeds share the latents.
            seed = self.seed if training.num_crop_variants else 0
            crops = [training.num_crop_variants, training.flip_probability > 0, seed]
            if training.num_crop_variants:  # random crops are seeded by the image's index
                crops += self.assign_buckets()[size]
        # Device and TF32 change the VAE's rounding: latents of one would break bit-equal resume on the other.
        how = [LATENTS_VERSION, self.diffusion.device, self.training.allow_tf32, list(size)]
        content = [how, self.base_model_sha256, [image.content() for image in images], crops]
        return Path(self.latent_folder) / f"{digest(content)[:32]}.safetensors"

    def fingerprint(self) -> dict[str, str]:
        """Return the digests that a checkpoint must match to be resumed."""
        images = [self.instance_images, self.class_images, self.holdout_images]
        # Paths are excluded: content and prompt identify an image.
        pairs = [[[image.content(), image.prompt] for image in group] for group in images]
        return {
            "configuration": digest(
                [
                    self.seed,
                    self.identifier_token,
                    self.class_noun,
                    self.training.result_fields(),
                    self.diffusion.resolution,
                ]
            ),
            "data": digest(pairs),
            "base model": self.base_model_sha256,
        }


class WorkerResult(Section):
    """The result of the worker, written last."""

    num_steps: int
    published_step: int
    start_step: int
    final_loss: float
    micro_batch_size: int
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    device: str = Field(description="name of the GPU, or cpu")
    files: dict[str, str] = Field(description="digests of everything that is stored, by path below the run folder")

    def model_files(self) -> list[str]:
        """Return the tuned model's files, relative to its folder."""
        return [name.removeprefix("model/") for name in self.files if name.startswith("model/")]


class WorkerFailure(Section):
    """The failure report of the worker."""

    kind: str = Field(description="class of the exception")
    message: str
    rank: int = 0
    world_size: int = 1

    def __str__(self) -> str:
        """Return one line that names the rank, where there are several."""
        where = f" on rank {self.rank}" if self.world_size > 1 else ""
        return f"{self.kind}{where}: {self.message}"


class RunFolder:
    """Paths of the files that worker and supervisor share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec = folder / "spec.json"
        self.checkpoints = folder / "checkpoints"
        self.losses = folder / "losses.jsonl"
        self.events = folder / "events.jsonl"
        self.stop = folder / "stop"
        self.result = folder / "result.json"
        self.failure = folder / "failure.json"
        self.model = folder / "model"
        self.best = folder / "best"
        self.candidates = folder / "candidates"
        self.samples = folder / "samples"
        self.log = folder / "worker.log"

    def emit_event(self, event: dict[str, Any]) -> None:
        """Append one event for the supervisor. Raises StorageFull."""
        with explain_full_disk(self.events), self.events.open("a") as file:
            file.write(dump_line(event))

    def digest_output(self) -> dict[str, str]:
        """Return the SHA-256 of every file that the training stage stores, by path below this folder."""
        folders = (self.model, self.candidates, self.samples)
        paths = [self.losses, *(path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())]
        return {path.relative_to(self.folder).as_posix(): digest_file(path) for path in paths}

    def heartbeat(self, rank: int) -> Path:
        """Return the file that a rank touches at every forward."""
        return self.folder / f"heartbeat-{rank}"


def compute_learning_rate_factor(config: TrainingConfig, step: int, *, rate: float) -> float:
    """Return the learning-rate multiplier in [0, 1] of an optimizer step, counted from 0.

    Equals `diffusers.optimization.get_scheduler` step by step: warm-up starts at 0 and decay starts after it.
    The polynomial schedule ends at an absolute 1e-7, so its multiplier depends on `rate`.
    """
    name, warmup = config.lr_scheduler, config.lr_warmup_steps
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, config.max_train_steps - warmup))
    place = config.lr_num_cycles * progress % 1.0
    # diffusers refuses rates below `lr_end`; here such a rate stays constant.
    end = min(1.0, POLYNOMIAL_END / rate)
    shapes: dict[str, float] = {
        "constant": 1.0,
        "constant_with_warmup": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        # At 1 the next cycle would restart at the full rate.
        "cosine_with_restarts": 0.0 if progress == 1 else 0.5 * (1 + math.cos(math.pi * place)),
        "polynomial": (1 - end) * (1 - progress) ** config.lr_power + end,
    }
    return shapes[name]
