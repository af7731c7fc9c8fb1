"""The frozen order that the supervisor hands to the worker, as one JSON file."""

import math
from pathlib import Path

from pydantic import Field

from tasks.contract import digest
from tasks.diffusion.config import DiffusionConfig
from tasks.settings import Section
from tasks.training.config import TrainingConfig

LATENTS_VERSION = 2  # of preprocessing and encoding
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: saved on request; run again


class TrainingImage(Section):
    """One picture to learn from."""

    path: str
    sha256: str
    prompt: str
    mask_path: str = ""
    mask_sha256: str = ""


class TrainingSpec(Section):
    """Everything the worker needs; it reads no other configuration."""

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
    instance_images: tuple[TrainingImage, ...]
    class_images: tuple[TrainingImage, ...]

    @property
    def path(self) -> Path:
        """The run folder."""
        return Path(self.folder)

    def latents_path(self, kind: str) -> Path:
        """Return the cache file of one half, named by everything that its latents depend on."""
        images, crops = self.class_images, [0, False, 0]
        if kind == "instance":
            training = self.training
            seed = self.seed if training.num_crop_variants else 0
            images, crops = self.instance_images, [training.num_crop_variants, training.flip_probability > 0, seed]
        how = [LATENTS_VERSION, self.diffusion.device, self.training.is_tf32, self.diffusion.resolution]
        content = [how, self.base_model_sha256, [[i.sha256, i.mask_sha256] for i in images], crops]
        return Path(self.latent_folder) / f"{digest(content)[:32]}.safetensors"

    def identity(self) -> dict[str, str]:
        """Return digests that a checkpoint must share to be resumed from."""
        images = [self.instance_images, self.class_images]
        pairs = [[(image.sha256, image.mask_sha256, image.prompt) for image in group] for group in images]
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


class RunFolder:
    """Names of the files that worker and supervisor share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec = folder / "spec.json"
        self.checkpoints = folder / "checkpoints"
        self.losses = folder / "losses.jsonl"
        self.events = folder / "events.jsonl"
        self.stop = folder / "stop"
        self.result = folder / "result.json"
        self.model = folder / "model"
        self.best = folder / "best"
        self.samples = folder / "samples"
        self.log = folder / "worker.log"

    def alive(self, rank: int) -> Path:
        """Return the file that a rank touches at every forward."""
        return self.folder / f"alive-{rank}"


def compute_learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Return the share of the learning rate at an optimizer step, counted from 0."""
    warmup = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    progress = step / config.max_train_steps
    shapes: dict[str, float] = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "cosine_with_restarts": 0.5 * (1 + math.cos(math.pi * (progress * config.lr_num_cycles % 1.0))),
        "polynomial": (1 - progress) ** config.lr_power,
    }
    return warmup * shapes[config.lr_schedule]
