"""Load the components of a diffusers folder: safetensors and allow-listed classes only."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tasks.errors import ConfigError, first_line
from tasks.redaction import show_value

# Classes that `model_index.json` may name, besides the family's denoiser: the file must not choose what code runs.
ALLOWED_CLASSES: dict[str, tuple[str, ...]] = {
    "transformers": (
        "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel",
        "CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast",
    ),
    "diffusers": ("AutoencoderKL",),
}  # fmt: skip
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def load_components(
    folder: Path,
    names: tuple[str, ...],
    *,
    denoiser_class: str,
    optional: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Return the named components, the VAE in float32; optional ones that the folder lacks are left out.

    Raises:
        ConfigError: a component is missing, is a pickle, or would need code from the repository.

    """
    scripts = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    if scripts:
        raise ConfigError(f"{folder} contains custom code ({scripts[0]}), which is never run; remove it")
    adapters = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("adapter_config.json"))
    if adapters:  # with PEFT installed, `from_pretrained` would load the base model that the file names
        raise ConfigError(f"{folder} holds {adapters[0]}, an adapter of another model; name a whole base model")
    classes = find_classes(folder, (*names, *optional), denoiser_class=denoiser_class)
    missing = [name for name in names if name not in classes]
    if missing:
        raise ConfigError(f"{folder} has no {missing[0]}")
    return {
        name: load_component(folder / name, component_class, dtype=torch.float32 if name == "vae" else dtype)
        for name, component_class in classes.items()
    }


def find_classes(folder: Path, names: tuple[str, ...], *, denoiser_class: str) -> dict[str, Any]:
    """Return the classes of the named components that the folder has. Raises ConfigError for one not allow-listed."""
    index = json.loads((folder / "model_index.json").read_text())
    classes = {}
    for name in names:
        library, class_name = index.get(name) or ("", None)  # `[null, null]` marks an absent component
        if class_name is None:
            continue
        if class_name not in ALLOWED_CLASSES.get(library, ()) and (library, class_name) != (
            "diffusers",
            denoiser_class,
        ):
            raise ConfigError(f"{folder}: {name} is a {library}.{class_name}, which this family doesn't load")
        classes[name] = getattr(transformers if library == "transformers" else diffusers, class_name)
    return classes


def load_component(folder: Path, component_class: Any, *, dtype: torch.dtype) -> Any:
    """Load one component. Raises ConfigError for a pickle or a broken folder."""
    is_tokenizer = "Tokenizer" in component_class.__name__
    if not is_tokenizer:
        check_weights(folder)
    try:
        if is_tokenizer:
            return component_class.from_pretrained(folder)
        # transformers has renamed the argument, diffusers has not.
        key = "dtype" if issubclass(component_class, transformers.PreTrainedModel) else "torch_dtype"
        return component_class.from_pretrained(folder, use_safetensors=True, **{key: dtype})
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = first_line(error)
        raise ConfigError(f"{folder} cannot be loaded as {component_class.__name__}: {reason}") from error


def check_weights(folder: Path) -> None:
    """Raise ConfigError unless a component's folder holds safetensors."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is missing")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json")
    check_shards(folder)
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ConfigError(f"{folder} holds {pickles[0]}, a pickle; only safetensors are loaded")
    raise ConfigError(f"{folder} holds no weights")


def check_shards(folder: Path) -> None:
    """Raise ConfigError where a shard index names anything but safetensors files of its own folder."""
    for index in sorted(folder.glob("*.index.json")):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{index} names no weights; download the model again") from error
        for shard in shards:
            # A path could lead out of the folder, and another format could be a pickle.
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ConfigError(f"{index} names {show_value(shard)}, which is not a safetensors file of its folder")


def load_scheduler(folder: Path, scheduler_class: Any) -> Any:
    """Load the scheduler's configuration into `scheduler_class`. Raises ConfigError where it is missing."""
    try:
        return scheduler_class.from_pretrained(folder / "scheduler")
    except (OSError, ValueError, TypeError) as error:
        reason = first_line(error)
        raise ConfigError(f"{folder}/scheduler cannot be loaded as {scheduler_class.__name__}: {reason}") from error
