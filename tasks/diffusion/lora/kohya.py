"""LoRA files in the naming of kohya-ss/sd-scripts, which ComfyUI, InvokeAI and A1111 read.

A layer is `<prefix>_<path of the layer in the original checkpoint, dots as underscores>` with the leaves
`lora_down.weight`, `lora_up.weight`, `alpha` and, for DoRA, `dora_scale` (one magnitude per output row, as
LyCORIS writes it). SD 3 and Flux checkpoints fuse layers that diffusers keeps apart: their adapters are
joined block-diagonally, so that the rank is the sum of the ranks and alpha grows with it.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OriginalLayer:
    """A layer of the original checkpoint; `{n}` in `path` and `parts` is the block's number.

    `parts` are the diffusers layers that it fuses, in order along the output dimension.
    """

    path: str
    parts: tuple[str, ...]


@dataclass
class LayerAdapter:
    """One layer's adapter: `down` `(r, in, ...)`, `up` `(out, r, ...)`, and for DoRA `magnitude` `(out, 1, ...)`."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the layer's tensors by their kohya leaf name."""
        yield "lora_down.weight", self.down
        yield "lora_up.weight", self.up
        yield "alpha", torch.tensor(self.alpha)  # a 0-d tensor, as sd-scripts writes it
        if self.magnitude is not None:
            yield "dora_scale", self.magnitude


@dataclass
class FusedAdapter:
    """Adapters of the diffusers layers that one original layer fuses, by index in its `parts`."""

    layer: OriginalLayer
    number: str
    adapters: dict[int, LayerAdapter] = field(default_factory=dict)


def to_kohya(state: dict[str, Tensor], module: nn.Module, *, prefix: str, alpha: float,
             layers: tuple[OriginalLayer, ...] = ()) -> dict[str, Tensor]:  # fmt: skip
    """Return one component's adapter under kohya's names.

    Args:
        state: tensors by PEFT's names, `<layer>.lora_A.weight` and so on.
        module: the component that holds the adapter; unused where `layers` is empty.
        prefix: `lora_unet`, `lora_te`, `lora_te1` or `lora_te2`.
        alpha: alpha of each diffusers layer; a fused layer gets the sum over its parts.
        layers: the original checkpoint's layers; empty where kohya uses diffusers' own names.

    """
    places = {part: (layer, index) for layer in layers for index, part in enumerate(layer.parts)}
    found: dict[str, LayerAdapter] = {}
    fused: dict[str, FusedAdapter] = {}
    for path, adapter in group_by_layer(state, alpha=alpha).items():
        number = re.search(r"blocks\.(\d+)\.", path)
        # `transformer_blocks.3.attn.to_q` -> `transformer_blocks.{n}.attn.to_q`
        template = re.sub(r"blocks\.\d+\.", "blocks.{n}.", path, count=1)
        if not layers:
            found[path] = adapter
        else:
            layer, index = places[template]
            block = number[1] if number else ""
            target = fused.setdefault(layer.path.replace("{n}", block), FusedAdapter(layer, block))
            target.adapters[index] = adapter if not is_swapped(module, path) else swap_halves(adapter)
    found |= {path: fuse(group, module) for path, group in fused.items()}
    return {
        f"{prefix}_{path.replace('.', '_')}.{leaf}": tensor.contiguous()
        for path, adapter in found.items()
        for leaf, tensor in adapter.tensors()
    }


def group_by_layer(state: dict[str, Tensor], *, alpha: float) -> dict[str, LayerAdapter]:
    """Group the tensors of a PEFT state dict by layer path."""
    leaves: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        path, leaf = key.split(".lora_", 1)  # `<path>`, and `A.weight`, `B.weight` or `magnitude_vector`
        leaves[path][leaf.removesuffix(".weight")] = tensor
    adapters = {}
    for path, found in leaves.items():
        up, magnitude = found["B"], found.get("magnitude_vector")
        if magnitude is not None:
            # (out,) -> (out, 1) for Linear, (out, 1, 1, 1) for Conv2d
            magnitude = magnitude.reshape(-1, *[1] * (up.ndim - 1))
        adapters[path] = LayerAdapter(found["A"], up, alpha, magnitude)
    return adapters


def is_swapped(module: nn.Module, path: str) -> bool:
    """Whether the original layer outputs (shift, scale) where diffusers' outputs (scale, shift)."""
    parent = module.get_submodule(path.rpartition(".")[0])
    return type(parent).__name__ == "AdaLayerNormContinuous"


def swap_halves(adapter: LayerAdapter) -> LayerAdapter:
    """Return the adapter with the two halves of its output swapped; `down` is unaffected."""

    def swap(tensor: Tensor) -> Tensor:
        return torch.cat(tensor.chunk(2)[::-1])  # (2D, ...), halves along the output dimension

    magnitude = None if adapter.magnitude is None else swap(adapter.magnitude)
    return LayerAdapter(adapter.down, swap(adapter.up), adapter.alpha, magnitude)


def fuse(group: FusedAdapter, module: nn.Module) -> LayerAdapter:
    """Join the adapters of a fused layer block-diagonally; parts without an adapter get zero rows.

    `down` is `(sum r, in)`, `up` `(sum out, sum r)`.
    """
    if len(group.layer.parts) == 1:
        return group.adapters[0]
    bases = [base_layer(module, part.replace("{n}", group.number)) for part in group.layer.parts]
    sizes = [int(base.weight.shape[0]) for base in bases]
    present = sorted(group.adapters.items())
    like = present[0][1]
    # All parts read the same input, so their down projections stack; up is block-diagonal, which keeps each part's
    # output independent of the other parts' ranks.
    down = torch.cat([adapter.down for _, adapter in present])
    up = like.up.new_zeros(sum(sizes), len(down))
    magnitude = None
    if like.magnitude is not None:  # rows without an adapter keep the norm of their base weight
        magnitude = torch.cat([base.weight.detach().float().cpu().norm(dim=1, keepdim=True) for base in bases])
    column = 0
    for index, adapter in present:
        row, rank = sum(sizes[:index]), adapter.up.shape[1]
        up[row : row + sizes[index], column : column + rank] = adapter.up  # rows of its output, columns of its rank
        column += rank
        if magnitude is not None and adapter.magnitude is not None:
            magnitude[row : row + sizes[index]] = adapter.magnitude
    # Readers scale by alpha / rank. With equal ranks, summing both keeps the ratio of each part.
    return LayerAdapter(down, up, sum(adapter.alpha for _, adapter in present), magnitude)


def base_layer(module: nn.Module, path: str) -> Any:
    """Return the layer that an adapter wraps, or the layer itself."""
    layer: Any = module.get_submodule(path)
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
