"""Locate the encoders of the metrics. Free of torch, so that a missing one is reported before any computation."""

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

from tasks.diffusion.hub import MINI_FOLDER
from tasks.encoders.config import EncoderConfig
from tasks.errors import ConfigError, first_line
from tasks.redaction import show_value
from tasks.stage.digests import digest_file, digest_folder

# The papers' encoders are published as pickles only; they are loaded with `weights_only=True`, which runs no code.
ALEXNET = "alexnet-owt-7be5be79.pth"  # as torchvision names it in torch's cache
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
CLASSES = {
    "clip": {"clip": "CLIPModel"},
    "dino": {
        "vit": "ViTModel", "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel",
        "dinov3_vit": "DINOv3ViTModel",
    },
}  # fmt: skip
"""Classes of transformers by kind of encoder and `model_type`; the first row of a DINO's output is the CLS token."""
MAX_SIDE = 2048  # largest input size that a preprocessor configuration may request, pixels
SIDES = ("height", "width", "shortest_edge", "longest_edge")


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
    """Return one encoder's local folder; `mini` names its kind, and its folder among the weights that are shipped.

    Raises:
        ConfigError: it can't be had, or is no encoder of that kind.

    """
    folder = MINI_FOLDER / mini if location == "mini" else Path(location)
    if not folder.is_dir():
        folder = fetch_encoder(location, revision)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise ConfigError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}; see evaluation.encoders")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; see evaluation.encoders")
    if (folder / "adapter_config.json").exists():  # with PEFT installed, the base model it names would be loaded
        raise ConfigError(f"{folder} holds adapter_config.json, an adapter of another model; name a whole encoder")
    find_class(folder, mini)
    read_preprocessor(folder)
    return folder


def find_class(folder: Path, kind: str) -> str:
    """Return the class of transformers that loads an encoder, by its `config.json`.

    Raises:
        ConfigError: the file is damaged, or names an architecture that isn't supported; another class would load
            none of its weights.

    """
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read: {first_line(error)}; see evaluation.encoders") from error
    found = settings.get("model_type") if isinstance(settings, dict) else None
    if not isinstance(found, str) or found not in CLASSES[kind]:
        supported = ", ".join(CLASSES[kind])
        raise ConfigError(
            f"{path}: model_type {show_value(found)} is no {kind} encoder ({supported}); see evaluation.encoders"
        )
    return CLASSES[kind][found]


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """Return a validated `preprocessor_config.json`: an unbounded size would exhaust memory.

    Raises:
        ConfigError: it is missing or damaged, or a number is out of bounds.

    """
    path = folder / "preprocessor_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} can't be read: {str(error) or 'nested too deeply'}; see evaluation.encoders"
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} is not a mapping; see evaluation.encoders")
    for name, default in (("size", 224), ("crop_size", 1), ("patch_size", 1)):
        value = settings.get(name, default)
        if not is_size(default if value is None and name != "size" else value, needs_edge=name == "size"):
            raise ConfigError(f"{path}: {name} is not a size of 1 to {MAX_SIDE} pixels")
    if settings.get("do_normalize", True):
        for name, least in (("image_mean", -math.inf), ("image_std", 0.0)):  # a deviation of 0 would divide by 0
            values = settings.get(name)
            if not (isinstance(values, list) and len(values) == 3 and all(is_number(v) and v > least for v in values)):
                raise ConfigError(f"{path}: {name} is not a list of 3 numbers{' above 0' if least == 0 else ''}")
    if not is_number(settings.get("rescale_factor", 1)):
        raise ConfigError(f"{path}: rescale_factor is not a number")
    resample = settings.get("resample", 0)
    if type(resample) is not int or not 0 <= resample <= 5:
        raise ConfigError(f"{path}: resample is none of Pillow's 0 to 5")
    return settings


def is_size(value: Any, *, needs_edge: bool) -> bool:
    """Whether a value is a size in pixels within bounds, or a mapping of sides to such sizes."""
    # `type() is int`, since JSON's true would pass isinstance.
    if not isinstance(value, dict):
        return type(value) is int and 1 <= value <= MAX_SIDE
    is_whole = {"height", "width"} <= set(value) or (needs_edge and "shortest_edge" in value)
    return is_whole and set(value) <= set(SIDES) and all(is_size(side, needs_edge=False) for side in value.values())


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and abs(value) < 1e6  # false for NaN, which `json` parses


def fetch_encoder(location: str, revision: str | None) -> Path:
    """Return the local copy of a hub repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(location, revision=revision, allow_patterns=["*.json", "*.txt", *WEIGHT_FILES]))
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"no encoder at {location}: it is not cached and the hub is not reached; run once online, name a folder "
            "(evaluation.encoders.clip and .dino), or set evaluation/encoders=mini for the drawn world"
        ) from error
    except (HfHubHTTPError, ValueError, OSError) as error:
        reason = first_line(error)
        raise ConfigError(f"no encoder at {location}: {reason}; see evaluation.encoders") from error


def find_lpips(config: EncoderConfig) -> tuple[Path, Path] | None:
    """Return the files of AlexNet's and of LPIPS's linear weights, or None where LPIPS isn't measured.

    Raises:
        ConfigError: a weights file is configured, but it or the package is missing.

    """
    if config.lpips == "none":
        return None
    package = importlib.util.find_spec("lpips")  # located, not imported: it needs torchvision
    places = package.submodule_search_locations or [] if package else []
    linear = [Path(place) / "weights" / "v0.1" / "alex.pth" for place in places]
    # The folder of `torch.hub`, by the same variables.
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
    """Return digests for the cache key; '' for a hub model, which its revision in the configuration identifies."""
    names = {"clip": config.clip, "dino": config.dino}
    folders = [MINI_FOLDER / kind if name == "mini" else Path(name) for kind, name in names.items()]
    digests = [digest_folder(folder) if folder.is_dir() else "" for folder in folders]
    return digests + [digest_file(path) for path in find_lpips(config) or ()]
