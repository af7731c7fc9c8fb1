"""LoRA (arXiv 2106.09685) on a loaded model: add it, write it in the formats that tools read, fuse it."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.training_utils import _collate_lora_metadata  # how diffusers' own trainers write alpha and rank
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tasks.diffusion.latent_model import LORA_FILE, LatentModel

KOHYA_FILE = "lora_kohya.safetensors"


def add_lora(model: LatentModel, parts: list[str], *, rank: int, alpha: float, dropout: float, is_dora: bool,
             target_modules: tuple[str, ...]) -> dict[str, nn.Module]:  # fmt: skip
    """Put LoRA layers into the named parts and return those; all else stays frozen.

    The layers begin as zero changes; their random half comes from torch's generator.
    """
    adapted = {}
    for name in parts:
        targets = target_modules if name == model.denoiser_name and target_modules else model.lora_targets[name]
        settings = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            use_dora=is_dora,
            init_lora_weights="gaussian",
            target_modules=list(targets),
        )
        model.parts[name].add_adapter(settings)
        for parameter in model.parts[name].parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # small updates vanish in half precision
        adapted[name] = model.parts[name]
    return adapted


def save_lora(model: LatentModel, folder: Path, names: list[str], *, alpha: float, is_dora: bool) -> None:
    """Write the adapter for diffusers and, beside it, in the naming of kohya that other tools read."""
    pipeline_class = getattr(diffusers, model.pipeline_class)
    layers: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name in names:
        part = model.parts[name]
        settings = part.peft_config["default"]
        settings.base_model_name_or_path = None  # a path of the machine that trained
        settings.target_modules = sorted(settings.target_modules)
        state = get_peft_model_state_dict(part)
        if name in model.text_encoders and not hasattr(part, "text_model"):
            # transformers 5 flattened this class; every tool knows its layers by their older names.
            state = {f"text_model.{key}": value for key, value in state.items()}
        plain |= {f"{name}.{key}": value.detach().cpu() for key, value in state.items()}
        layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(state)
        metadata[name] = part
    folder.mkdir(parents=True, exist_ok=True)
    collated = _collate_lora_metadata(metadata)
    pipeline_class.save_lora_weights(folder, safe_serialization=True, **layers, **collated)
    if model.denoiser_name == "unet" and not is_dora:
        kohya = convert_state_dict_to_kohya(plain)
        # The converter writes the rank as alpha, whatever alpha was.
        kohya = {key: torch.tensor(alpha) if key.endswith(".alpha") else value for key, value in kohya.items()}
        if len(model.text_encoder_names) == 1:  # encoders are numbered only where there are two
            kohya = {key.replace("lora_te1_", "lora_te_"): value for key, value in kohya.items()}
        save_file({key: value.contiguous() for key, value in kohya.items()}, folder / KOHYA_FILE)


@torch.no_grad()
def fuse_lora(model: LatentModel, folder: Path) -> None:
    """Add a saved adapter to the weights, through diffusers' own loader."""
    pipeline = model.make_pipeline()
    pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
    with safe_open(folder / LORA_FILE, "pt") as file:
        names = sorted({key.split(".")[0] for key in file.keys()})  # noqa: SIM118 - not a dict
    pipeline.fuse_lora(components=names)  # Flux would leave its text encoder out
    pipeline.unload_lora_weights()
