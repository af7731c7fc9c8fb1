"""How other programs read LoRA files: which key stands for which layer, and what is done with its tensors.

Each reader gives the change of every weight of the original checkpoint, by that checkpoint's own names.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAVES = {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"}


def group(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the leaves of every layer of a kohya file; every layer is whole and has an alpha."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, leaf = key.split(".", 1)
        assert leaf in LEAVES, key
        layers.setdefault(layer, {})[leaf] = tensor
    for layer, leaves in layers.items():
        assert LEAVES - {"dora_scale"} <= set(leaves), layer
        assert leaves["alpha"].ndim == 0, layer
    return layers


def change(leaves: dict[str, Tensor], weight: Tensor) -> Tensor:
    """Return what a layer adds to its weight: alpha / rank x up x down; with `dora_scale` each output row is then
    brought to that length (LyCORIS and ComfyUI, where the scale has the weight's number of rows)."""
    down, up = leaves["lora_down.weight"].float(), leaves["lora_up.weight"].float()
    scale = float(leaves["alpha"]) / down.shape[0]
    delta = scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    if "dora_scale" not in leaves:
        return delta
    assert leaves["dora_scale"].shape == (weight.shape[0], *[1] * (weight.ndim - 1))
    merged = weight + delta
    norms = merged.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
    return merged * leaves["dora_scale"].float() / norms - weight


@dataclass(frozen=True)
class Reader:
    """A program: how it turns layer names of the checkpoint and of text encoders into keys."""

    name: str
    denoiser: tuple[str, ...]
    text_encoders: dict[str, tuple[str, ...]]

    def keys(self, checkpoint: Iterable[str], texts: dict[str, Iterable[str]]) -> dict[str, tuple[str, str]]:
        """Return part and weight of each key that the program knows."""
        found = {}
        for path in checkpoint:
            found |= {f"{prefix}{path.replace('.', '_')}": ("denoiser", path) for prefix in self.denoiser}
        for part, paths in texts.items():
            for path in paths:
                for prefix in self.text_encoders.get(part, ()):
                    found[f"{prefix}{path.replace('.', '_')}"] = (part, path)
        return found


# sd-scripts: LoRANetwork of networks/lora.py (SD, SDXL), lora_flux.py and lora_sd3.py: prefix and module path.
ONE = {"text_encoder": ("lora_te_",)}
TWO = {"text_encoder": ("lora_te1_",), "text_encoder_2": ("lora_te2_",)}
KOHYA = {
    "stable_diffusion": Reader("sd-scripts", ("lora_unet_",), ONE),
    "stable_diffusion_xl": Reader("sd-scripts", ("lora_unet_",), TWO),
    "stable_diffusion_3": Reader("sd-scripts", ("lora_unet_",), TWO),
    "flux": Reader("sd-scripts", ("lora_unet_",), {"text_encoder": ("lora_te1_",)}),
}
# ComfyUI: model_lora_keys_unet and model_lora_keys_clip of comfy/lora.py.
COMFY = {
    "stable_diffusion": Reader("ComfyUI", ("lora_unet_",), {"text_encoder": ("lora_te_", "lora_te1_")}),
    "stable_diffusion_xl": Reader("ComfyUI", ("lora_unet_",), TWO),
    "stable_diffusion_3": Reader("ComfyUI", ("lora_unet_",), TWO),
    "flux": Reader("ComfyUI", ("lora_unet_",), {"text_encoder": ("lora_te_", "lora_te1_")}),
}

# InvokeAI: flux_kohya_lora_conversion_utils.py; a file is Flux's only if every key matches one of these.
INVOKE_FLUX = (
    r"lora_unet_(\w+_blocks)_(\d+)_(img_attn|img_mlp|img_mod|txt_attn|txt_mlp|txt_mod|linear1|linear2|modulation)_?(.*)",
    r"lora_te1_text_model_encoder_layers_(\d+)_(mlp|self_attn)_(\w+)\.?.*",
)


def invoke_flux_path(key: str) -> str:
    """Return the layer that InvokeAI puts a key of a Flux file to."""
    if block := re.fullmatch(INVOKE_FLUX[0], key):
        return ".".join(part for part in block.groups() if part)
    text = re.fullmatch(INVOKE_FLUX[1], key)
    assert text, key
    return f"text_model.encoder.layers.{text[1]}.{text[2]}.{text[3]}"


def resolve_invoke_sdxl(key: str, modules: Iterable[str]) -> str:
    """Return the module that InvokeAI finds for a key by underscores: the one whose whole path it spells."""
    name = key.removeprefix("lora_unet_")
    found = [module for module in modules if module.replace(".", "_") == name]
    assert len(found) == 1, key
    return found[0]


def original_sd3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a tiny SD 3 transformer's weights by the names and shapes of the published checkpoint."""
    names = {
        "attn.to_out.0": "x_block.attn.proj", "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
        "norm1.linear": "x_block.adaLN_modulation.1", "attn.to_add_out": "context_block.attn.proj",
        "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
    }  # fmt: skip
    outside = {
        "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2", "proj_out": "final_layer.linear",
    }  # fmt: skip
    found = {theirs: state[ours] for ours, theirs in outside.items()}
    found["final_layer.adaLN_modulation.1"] = shift_first(state["norm_out.linear"])
    number = max(int(path.split(".")[1]) for path in state if path.startswith("transformer_blocks."))
    for i in range(number + 1):
        block = {path.split(".", 2)[2]: w for path, w in state.items() if path.startswith(f"transformer_blocks.{i}.")}
        found |= {f"joint_blocks.{i}.{theirs}": block[ours] for ours, theirs in names.items() if ours in block}
        joined = {"x_block": ("to_q", "to_k", "to_v"), "context_block": ("add_q_proj", "add_k_proj", "add_v_proj")}
        for stream, parts in joined.items():
            found[f"joint_blocks.{i}.{stream}.attn.qkv"] = torch.cat([block[f"attn.{part}"] for part in parts])
        if i == number:  # its text stream ends here: two modulations, in the other order
            path = f"joint_blocks.{i}.context_block.adaLN_modulation.1"
            found[path] = shift_first(found[path])
    return found


def original_flux(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a tiny Flux transformer's weights by the names and shapes of the published checkpoint."""
    names = {
        "attn.to_out.0": "img_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
        "norm1.linear": "img_mod.lin", "attn.to_add_out": "txt_attn.proj", "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2", "norm1_context.linear": "txt_mod.lin",
    }  # fmt: skip
    outside = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
    for theirs, ours in (("time_in", "timestep"), ("guidance_in", "guidance"), ("vector_in", "text")):
        outside |= {f"time_text_embed.{ours}_embedder.linear_1": f"{theirs}.in_layer",
                    f"time_text_embed.{ours}_embedder.linear_2": f"{theirs}.out_layer"}  # fmt: skip
    found = {theirs: state[ours] for ours, theirs in outside.items()}
    found["final_layer.adaLN_modulation.1"] = shift_first(state["norm_out.linear"])
    for kind, theirs in (("transformer_blocks", "double_blocks"), ("single_transformer_blocks", "single_blocks")):
        for i in sorted({path.split(".")[1] for path in state if path.startswith(f"{kind}.")}):
            block = {path.split(".", 2)[2]: w for path, w in state.items() if path.startswith(f"{kind}.{i}.")}
            qkv = [block[f"attn.to_{part}"] for part in "qkv"]
            if kind == "transformer_blocks":
                found |= {f"{theirs}.{i}.{name}": block[ours] for ours, name in names.items()}
                found[f"{theirs}.{i}.img_attn.qkv"] = torch.cat(qkv)
                added = [block[f"attn.add_{part}_proj"] for part in "qkv"]
                found[f"{theirs}.{i}.txt_attn.qkv"] = torch.cat(added)
            else:
                found[f"{theirs}.{i}.linear1"] = torch.cat([*qkv, block["proj_mlp"]])
                found[f"{theirs}.{i}.linear2"] = block["proj_out"]
                found[f"{theirs}.{i}.modulation.lin"] = block["norm.linear"]
    return found


def shift_first(weight: Tensor) -> Tensor:
    """Return scale and shift in the checkpoint's order."""
    return torch.cat(weight.chunk(2)[::-1])
