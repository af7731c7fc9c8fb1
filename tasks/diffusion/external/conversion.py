"""Bring a model of another trainer into the form of our own tuned models; nothing of it may be ignored silently."""

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.external.detection import ExternalModel
from tasks.diffusion.hub import ALLOW_PATTERNS
from tasks.diffusion.registry import find_family, load_model
from tasks.diffusion.textual_inversion import EMBEDS_KEYS, save_tokens
from tasks.diffusion.types import LORA_FILE
from tasks.errors import ConfigError, first_line
from tasks.redaction import logger_level
from tasks.stage.tensor_files import save_tensors

ADAPTER = "external"
DOWN = (".lora_A.", ".lora_down.", ".lora.down.", "_lora.down.", "lora_linear_layer.down.")
"""How formats name the factor that maps a layer's input to the rank."""
MAX_NAMED = 3


def convert(model: ExternalModel, config: DiffusionConfig, folder: Path, *, identifier_token: str) -> None:
    """Write a model as `load_model` opens it: a diffusers folder, or adapters for the configured base.

    Raises:
        ConfigError: a part is missing or a pickle, it is for another family, or a tensor of it has no place.

    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if model.kind == "pipeline":
        # Loaded first, which checks classes, parts and weights.
        find_family(config.family).load(model.path, config)
        for pattern in ALLOW_PATTERNS:
            for path in model.path.glob(pattern):
                target = folder / path.relative_to(model.path)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
    elif model.kind == "lora":
        convert_lora(model, load_model(config), folder)
    else:
        convert_embedding(model, load_model(config), folder, identifier_token=identifier_token)


def convert_lora(external: ExternalModel, model: DiffusionModel, folder: Path) -> None:
    """Load a LoRA through diffusers, and write it in PEFT's names with the scale alpha / rank folded in.

    Raises:
        ConfigError: it is for another family, or some of its tensors don't load; names them.

    """
    try:
        # diffusers also logs what it raises; a refused LoRA is one line.
        with warnings.catch_warnings(), logger_level("diffusers.loaders.peft", logging.CRITICAL):
            warnings.filterwarnings("ignore", message="Already found a `peft_config`", category=UserWarning)
            # Layers of the file that the model lacks: `check_loaded` names them.
            warnings.filterwarnings("ignore", message="While injecting the PEFT adapters", category=RuntimeWarning)
            model.make_pipeline().load_lora_weights(
                external.path.parent, weight_name=external.path.name, adapter_name=ADAPTER
            )
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{describe(external, model)}: {first_line(error)}") from error
    layers = {name: list_layers(part) for name, part in model.components.items() if isinstance(part, nn.Module)}
    check_loaded(external, model, layers)
    tensors: dict[str, Tensor] = {}
    for component, found in layers.items():
        # transformers 5 removed the `text_model.` level of CLIPTextModel, but loaders expect the older names.
        is_text = component in model.text_encoders and not hasattr(model.components[component], "text_model")
        prefix = f"{component}.text_model" if is_text else component
        for path, layer in found.items():
            down, up = (getattr(layer, side)[ADAPTER].weight.detach().float().cpu() for side in ("lora_A", "lora_B"))
            tensors[f"{prefix}.{path}.lora_A.weight"] = down.contiguous()
            tensors[f"{prefix}.{path}.lora_B.weight"] = (up * layer.scaling[ADAPTER]).contiguous()
    save_tensors(tensors, folder / LORA_FILE, metadata={"format": "pt"})


def list_layers(module: nn.Module) -> dict[str, Any]:
    """Return the layers that the adapter was loaded into, by path; those on the meta device got no weights."""
    return {
        path: layer
        for path, layer in module.named_modules()
        if ADAPTER in getattr(layer, "lora_A", {}) and not layer.lora_A[ADAPTER].weight.is_meta
    }


def check_loaded(external: ExternalModel, model: DiffusionModel, layers: dict[str, dict[str, Any]]) -> None:
    """Raise ConfigError where a layer of the file was not loaded: diffusers skips what it doesn't know."""
    stored = load_file(external.path)
    if any("dora_scale" in key or "lora_magnitude" in key for key in stored):
        raise ConfigError(
            f"{external.path} is a DoRA, whose magnitudes can't be folded; merge it into a diffusers folder"
        )
    downs = [key for key in stored if any(mark in key for mark in DOWN)]
    loaded = [layer.lora_A[ADAPTER].weight.detach().cpu() for found in layers.values() for layer in found.values()]
    if model.original_layers:  # a fused layer of the file becomes several of diffusers, so tensors can't be matched
        missing = downs if len(loaded) < len(downs) else []
    else:
        missing = [key for key in downs if not any(is_same(stored[key], weight) for weight in loaded)]
    if missing or not loaded:
        named = ", ".join(missing[:MAX_NAMED]) or "none of its keys is known"
        more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
        raise ConfigError(
            f"{describe(external, model)}: {len(missing)} of {len(downs)} layers don't load ({named}{more})"
        )


def is_same(stored: Tensor, loaded: Tensor) -> bool:
    """Whether a stored factor is the loaded one, rounded to the dtype of the base model.

    1x1 convolutions may be stored as matrices.
    """
    return stored.numel() == loaded.numel() and torch.equal(stored.to(loaded.dtype).flatten(), loaded.flatten())


def describe(external: ExternalModel, model: DiffusionModel) -> str:
    """Return the beginning of an error: which file does not fit which base, and what the file says it is for."""
    metadata = dict(external.metadata)
    said = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version") or ""
    what = f" (made for {said})" if said else ""
    return f"{external.path}{what} doesn't fit the base model {model.architecture}"


def convert_embedding(external: ExternalModel, model: DiffusionModel, folder: Path, *, identifier_token: str) -> None:
    """Write an embedding under our identifier token: `(V, D)` for each text encoder.

    Raises:
        ConfigError: an encoder has no vectors, or vectors of another width.

    """
    stored = load_file(external.path)
    by_long_name = {long: name for name, long in EMBEDS_KEYS.items()}
    found: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name = by_long_name.get(key, next(iter(model.text_encoders)))
        # diffusers stores a single vector as (D,).
        found[name] = tensor.float() if tensor.ndim == 2 else tensor.float()[None]
    for name, rows in found.items():
        if name not in model.text_encoders:
            raise ConfigError(f"{describe(external, model)}: it has no {name}")
        width = model.text_encoders[name].get_input_embeddings().weight.shape[1]
        if rows.shape[1] != width:
            raise ConfigError(f"{describe(external, model)}: vectors of {rows.shape[1]} for a {name} of {width}")
    if len(found) < len(stored):
        raise ConfigError(f"{describe(external, model)}: several embeddings in one file ({', '.join(stored)})")
    save_tokens(folder, identifier_token, found)
