"""Predict the peak memory of training before anything is loaded: shapes alone, on torch's meta device.

Weights, gradients, optimizer state and averages are counted exactly; activations are those that a
forward would keep for the backward, found by running one without numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tasks.diffusion.adapter import DTYPES, DiffusionModel
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.loading import find_classes
from tasks.diffusion.registry import find_family
from tasks.diffusion.types import Conditioning
from tasks.training.config import TrainingConfig
from tasks.training.memory.table import MOMENT_BYTES, MemoryEstimate, count_rows
from tasks.training.methods import lora_shape

META = torch.device("meta")


def estimate_methods(
    folder: Path, diffusion: DiffusionConfig, training: TrainingConfig, *, methods: Sequence[str]
) -> dict[str, MemoryEstimate]:
    """Return what each method would take; the model is built once, and adapted last, since adapters stay."""
    model = build_empty(folder, diffusion)
    found = {}
    for method in sorted(methods, key=lambda name: name.endswith("lora")):
        found[method] = estimate_built(model, training.model_copy(update={"method": method}))
        for part in model.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
    return {method: found[method] for method in methods}


def estimate_memory(folder: Path, diffusion: DiffusionConfig, training: TrainingConfig) -> MemoryEstimate:
    """Return what training would take, from the configuration files in a model's folder alone."""
    return estimate_built(build_empty(folder, diffusion), training)


def estimate_built(model: DiffusionModel, training: TrainingConfig) -> MemoryEstimate:
    """Return what training a model of shapes would take."""
    trained = choose_trained(model, training)
    trainable = sum(p.numel() for p in trained)
    ids = {id(p) for p in trained}
    total = weights = 0
    frozen_size = DTYPES[training.weight_dtype].itemsize
    shards = max(1, training.world_size) if training.fsdp else 1
    for name, part in model.components.items():
        parameters = list(part.parameters()) if isinstance(part, nn.Module) else []
        num_shards = shards if any(id(parameter) in ids for parameter in parameters) else 1
        for parameter in parameters:
            total += parameter.numel()
            if name != "vae":  # it leaves the device once the latents are cached
                weights += parameter.numel() * (4 if id(parameter) in ids else frozen_size) // num_shards
    if training.mixed_precision != "no" and shards == 1:
        weights += trainable * 2  # autocast keeps a copy of the weights in half precision
    moment_size = MOMENT_BYTES.get(training.optimizer, 8)
    return MemoryEstimate(
        weights=weights,
        gradients=trainable * 4 // shards,
        optimizer_state=trainable * moment_size // shards,
        ema=trainable * 4 // shards if training.ema_decay else 0,
        activations=count_activations(model, training),
        trainable_parameters=trainable,
        total_parameters=total,
    )


def build_empty(folder: Path, config: DiffusionConfig) -> DiffusionModel:
    """Return the family's model with shapes and without numbers."""
    family = find_family(config.family)
    names = (*family.text_encoder_names, family.denoiser_name, "vae")
    components: dict[str, Any] = {}
    for name, part_class in find_classes(folder, names, denoiser_class=family.denoiser_class).items():
        with META:
            if issubclass(part_class, transformers.PreTrainedModel):
                components[name] = part_class(part_class.config_class.from_pretrained(folder / name))
            else:
                components[name] = part_class.from_config(part_class.load_config(folder / name))
    empty: Any = type(f"Empty{family.__name__}", (WithoutTokenizers, family), {})
    model: DiffusionModel = empty(components, family.load_noise(folder), config, device=META)
    return model


def choose_trained(model: DiffusionModel, training: TrainingConfig) -> list[nn.Parameter]:
    """Make trainable what the method learns, and return it."""
    from tasks.diffusion.lora.adapters import add_lora

    trained: list[nn.Parameter] = []
    names = list(model.trainable_modules(train_text_encoder=training.train_text_encoder))
    names = [name for name in names if training.train_denoiser or name != model.denoiser_name]
    if training.method.endswith("lora"):
        if not hasattr(model.denoiser, "peft_config"):
            with META:
                add_lora(model, names, lora_shape(training.lora))
        trained = [p for name in names for key, p in model.components[name].named_parameters() if ".lora_" in key]
        for parameter in trained:
            parameter.requires_grad_(True)
    elif training.method.endswith("full"):
        for name in names:
            model.components[name].requires_grad_(True)
        trained = [p for name in names for p in model.components[name].parameters()]
    if training.method.startswith("textual_inversion"):
        able = model.trainable_modules(train_text_encoder=True)
        for table in (model.components[name].get_input_embeddings() for name in model.text_encoders if name in able):
            table.requires_grad_(True)  # the gradient passes through the whole encoder
            vectors = torch.empty(training.textual_inversion.num_vectors, table.weight.shape[1], device=META)
            trained = [parameter for parameter in trained if parameter is not table.weight]
            trained.append(nn.Parameter(vectors))
    return trained


def count_activations(model: DiffusionModel, training: TrainingConfig) -> int:
    """Return the bytes that one forward keeps for the backward."""
    rows = count_rows(training)
    if training.gradient_checkpointing:
        model.denoiser.train()
        model.denoiser.enable_gradient_checkpointing()
    channels = int(model.vae.config.latent_channels)
    side = model.config.resolution // 2 ** (len(model.vae.config.block_out_channels) - 1)
    latents = torch.zeros(rows, channels, side, side, device=META)
    timesteps = torch.zeros(rows, device=META)
    modules = [part for part in model.components.values() if isinstance(part, nn.Module)]
    weights = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), flash_attention():
        conditioning = encode_empty(model, rows)
        model.predict(latents, timesteps, conditioning, time_ids=torch.zeros(rows, 6, device=META))
    total = sum(storage.nbytes() for storage in kept.values())
    return total if training.mixed_precision == "no" else int(total * 0.55)


class FlashAttention(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs and its output, no matrix of weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: PLR0917 - autograd's hook
        """Return an output of the right shape."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """Refuse: shapes without numbers are only ever run forward."""
        raise RuntimeError("an estimate has no numbers to run backward with")


@contextmanager
def flash_attention() -> Iterator[None]:
    """Let attention keep what fused kernels do; on the meta device torch would take the plain ones."""
    plain = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return FlashAttention.apply(query, key, value)  # type: ignore[no-any-return, no-untyped-call]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def encode_empty(model: DiffusionModel, rows: int) -> Conditioning:
    """Return the conditioning of prompts without words."""
    length = sum(model.max_length(name) for name in model.text_encoders)
    return model.encode_prompts(torch.zeros(rows, length, dtype=torch.long, device=META))


class WithoutTokenizers:
    """Token limits for models that are only shapes."""

    max_lengths: dict[str, int]
    components: dict[str, Any]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return ids that no prompt has."""
        length = sum(self.max_length(name) for name in self.components if name.startswith("text_encoder"))
        return torch.full((len(prompts), length), -1, device=META)

    def max_length(self, name: str) -> int:
        """Return the family's limit, or the encoder's own."""
        return self.max_lengths.get(name) or int(self.components[name].config.max_position_embeddings)
