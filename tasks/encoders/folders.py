"""Where the measuring encoders lie; torch-free, so that a missing one is named before anything is computed."""

import importlib.util
import os
from pathlib import Path

from tasks.diffusion.base import MINI_FOLDER
from tasks.encoders.config import EncoderConfig
from tasks.errors import ConfigError
from tasks.stage.digests import digest_file, digest_folder

# The paper's encoders were published as pickles alone; torch reads them as weights only, never as code.
ALEXNET = "alexnet-owt-7be5be79.pth"  # as torchvision names it in torch's cache
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def find_encoders(config: EncoderConfig) -> tuple[Path, Path]:
    """Return the folders of CLIP and DINO, downloading hub repositories at their revisions.

    Raises:
        ConfigError: there is no such model, or it holds no weights.

    """
    return (
        find_encoder(config.clip, config.clip_revision, mini="clip"),
        find_encoder(config.dino, config.dino_revision, mini="dino"),
    )


def find_encoder(location: str, revision: str | None, *, mini: str) -> Path:
    """Return one encoder's local folder."""
    folder = MINI_FOLDER / mini if location == "mini" else Path(location)
    if not folder.is_dir():
        folder = fetch_encoder(location, revision)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise ConfigError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}; see evaluation.encoders")
    return folder


def fetch_encoder(location: str, revision: str | None) -> Path:
    """Return the local copy of a hub repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(location, revision=revision, allow_patterns=["*.json", "*.txt", *WEIGHT_FILES]))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"no encoder at {location}: {reason}; see evaluation.encoders") from error


def find_lpips(config: EncoderConfig) -> tuple[Path, Path] | None:
    """Return the weights of AlexNet and of LPIPS's calibration, or None where LPIPS isn't measured.

    Raises:
        ConfigError: weights are named, but they or the package aren't there.

    """
    if config.lpips == "none":
        return None
    package = importlib.util.find_spec("lpips")
    places = package.submodule_search_locations or [] if package else []
    linear = [Path(place) / "weights" / "v0.1" / "alex.pth" for place in places]
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    cached = Path(os.environ.get("TORCH_HOME", cache)).expanduser() / "hub" / "checkpoints" / ALEXNET
    trunk = cached if config.lpips == "auto" else Path(config.lpips)
    if linear and linear[0].is_file() and trunk.is_file():
        return trunk, linear[0]
    if config.lpips == "auto":
        return None
    missing = str(trunk) if not trunk.is_file() else "the package lpips (pip install lpips)"
    raise ConfigError(f"evaluation.encoders.lpips needs {missing}; or set it to auto or none")


def identify_encoders(config: EncoderConfig) -> list[str]:
    """Return digests of the encoders that lie in a folder; hub ones are known by their revision."""
    names = {"clip": config.clip, "dino": config.dino}
    folders = [MINI_FOLDER / kind if name == "mini" else Path(name) for kind, name in names.items()]
    digests = [digest_folder(folder) if folder.is_dir() else "" for folder in folders]
    return digests + [digest_file(path) for path in find_lpips(config) or ()]
