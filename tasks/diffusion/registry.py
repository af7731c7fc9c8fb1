"""Model families by name, and how the configured model is opened."""

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.hub import find_folder
from tasks.diffusion.types import LORA_FILE

if TYPE_CHECKING:
    from tasks.diffusion.adapter import DiffusionModel


def find_family(name: str) -> "type[DiffusionModel]":
    """Return a family's adapter class. Imported on demand: each takes seconds to import diffusers."""
    match name:
        case "stable_diffusion":
            from tasks.diffusion.families.stable_diffusion import StableDiffusion

            return StableDiffusion
        case "stable_diffusion_xl":
            from tasks.diffusion.families.stable_diffusion_xl import StableDiffusionXl

            return StableDiffusionXl
        case "stable_diffusion_3":
            from tasks.diffusion.families.stable_diffusion_3 import StableDiffusion3

            return StableDiffusion3
        case "flux":
            from tasks.diffusion.families.flux import Flux

            return Flux
    raise ValueError(f"no model family {name!r}")


def load_model(
    config: DiffusionConfig, *, folder: Path | None = None, precision: str | None = None, lora_scale: float = 1.0
) -> "DiffusionModel":
    """Load the configured base model, or the tuned one in a folder: a whole model, or adapters for the base model.

    Args:
        config: the base model.
        folder: the tuned model; None: the base model.
        precision: dtype of all weights but the VAE's (`fp32`, `bf16`, `fp16`): half precision halves their memory.
            None: the dtype that sampling computes in.
        lora_scale: factor of a LoRA's weights in the folder.

    """
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    # A folder without an index holds adapters, which are applied to the base model.
    is_whole = folder is not None and (folder / "model_index.json").is_file()
    source = folder if folder is not None and is_whole else find_folder(config)
    model = find_family(config.family).load(source, config, dtype=dtypes[precision or config.precision])
    if folder is not None:
        apply_adapters(model, folder, lora_scale=lora_scale)
    return model


def apply_adapters(model: "DiffusionModel", folder: Path, *, lora_scale: float = 1.0) -> None:
    """Load textual inversion embeddings and LoRA weights from a folder where present, and merge them."""
    from tasks.diffusion.textual_inversion import EMBEDS_FILE, load_tokens

    if (folder / EMBEDS_FILE).is_file():
        identifier_token, vectors = load_tokens(folder / EMBEDS_FILE)
        model.add_placeholder_tokens(identifier_token, vectors)
        model.merge_token_embeddings()
    if (folder / LORA_FILE).is_file():
        from tasks.diffusion.lora.adapters import fuse_lora

        fuse_lora(model, folder, scale=lora_scale)
