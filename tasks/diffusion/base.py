"""What a model family offers, and how the configured one is opened.

A family is one adapter file: it owns loading, prompt and image encoding, noising, target,
prediction, saving and sampling. Nothing else knows its architecture.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tasks.contract import digest, digest_folder
from tasks.diffusion.config import DiffusionConfig
from tasks.errors import ConfigError
from tasks.manifests import ModelRef

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

MINI_FOLDER = Path(__file__).resolve().parent.parent / "mini" / "weights"
FAMILIES = {"stable_diffusion": "tasks.diffusion.stable_diffusion"}
# Anything else in a repository could be code, a pickle, or gigabytes of another precision.
WEIGHT_PATTERNS = (
    "model_index.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt",
    "text_encoder/config.json", "text_encoder/model.safetensors",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Posterior:
    """The VAE's Gaussian over latents, already scaled; each `(B, C, h, w)`."""

    mean: "Tensor"
    std: "Tensor"


@dataclass(frozen=True)
class SamplingRequest:
    """One picture to draw."""

    prompt: str
    seed: int


class DiffusionModel(Protocol):
    """A loaded base or tuned model. B images, C latent channels, h = H/8 (mini: H/4)."""

    def trainable_modules(self, *, is_text_encoder_trained: bool) -> "dict[str, nn.Module]":
        """Return the modules that fine-tuning changes; everything else is frozen."""

    def tokenize(self, prompts: Sequence[str]) -> "Tensor":
        """Return token ids `(B, L)`."""

    def encode_prompts(self, input_ids: "Tensor") -> "Tensor":
        """Return `encoder_hidden_states` `(B, L, D)`."""

    def encode_images(self, pixel_values: "Tensor") -> Posterior:
        """Return the scaled posterior of `(B, 3, H, W)` in [-1, 1]."""

    def add_noise(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Return `noisy_latents`."""

    def compute_target(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Return what the prediction should be: noise or velocity."""

    def predict(self, noisy_latents: "Tensor", timesteps: "Tensor", encoder_hidden_states: "Tensor") -> "Tensor":
        """Return the denoiser's prediction."""

    @property
    def num_train_timesteps(self) -> int:
        """Number of noise levels in training."""

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


def open_model(config: DiffusionConfig, *, folder: Path | None = None) -> DiffusionModel:
    """Load the configured base model, or the tuned weights in a folder."""
    family = importlib.import_module(FAMILIES[config.family])
    model: DiffusionModel = family.load(folder or find_folder(config), config)
    return model


def find_folder(config: DiffusionConfig) -> Path:
    """Return the local folder of the base model, downloading a hub repository at its revision.

    Raises:
        ConfigError: there is no such model.

    """
    if config.location == "mini":
        return MINI_FOLDER / "base"
    path = Path(config.location)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ConfigError(f"{path} is not a diffusers folder: it has no model_index.json")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(config.location, revision=config.revision, allow_patterns=list(WEIGHT_PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"no base model at diffusion.location={config.location}: {reason}") from error


def identify_model(config: DiffusionConfig) -> ModelRef:
    """Return the base model by content: a digest of its files, or of its pinned hub commit."""
    is_local = config.location == "mini" or Path(config.location).is_dir()
    if not is_local and config.revision:
        return ModelRef(
            location=config.location,
            revision=config.revision,
            sha256=digest([config.location, config.revision]),
        )
    return ModelRef(
        location=config.location,
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
