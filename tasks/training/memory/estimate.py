"""Predict the peak memory of training from shapes alone, on torch's meta device, without loading weights.

Weights, gradients, optimizer state and EMA are counted exactly. Activations are the tensors that autograd saves in a
forward on the meta device.
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
from tasks.training.memory.table import OPTIMIZER_STATE_BYTES, MemoryEstimate, count_rows
from tasks.training.methods import make_lora_hyperparameters

META = torch.device("meta")


def estimate_methods(
    folder: Path, diffusion: DiffusionConfig, training: TrainingConfig, *, methods: Sequence[str]
) -> dict[str, MemoryEstimate]:
    """Estimate several methods on one model; LoRA methods come last, since adapters stay in the model."""
    model = build_meta_model(folder, diffusion)
    found = {}
    for method in sorted(methods, key=lambda name: name.endswith("lora")):
        found[method] = estimate_built(model, training.model_copy(update={"method": method}))
        for part in model.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
    return {method: found[method] for method in methods}


def estimate_memory(folder: Path, diffusion: DiffusionConfig, training: TrainingConfig) -> MemoryEstimate:
    """Estimate training from the configuration files of a model folder; no weights are needed."""
    return estimate_built(build_meta_model(folder, diffusion), training)


def estimate_built(model: DiffusionModel, training: TrainingConfig) -> MemoryEstimate:
    """Estimate training of a model on the meta device, in bytes per device."""
    trained = mark_trainable(model, training)
    trainable = sum(p.numel() for p in trained)
    ids = {id(p) for p in trained}
    total = weights = 0
    frozen_size = DTYPES[training.weight_dtype].itemsize
    shards = max(1, training.world_size) if training.fsdp else 1
    for name, part in model.components.items():
        parameters = list(part.parameters()) if isinstance(part, nn.Module) else []
        # `fully_shard` wraps whole components: frozen parameters of a trained one are sharded too.
        num_shards = shards if any(id(parameter) in ids for parameter in parameters) else 1
        for parameter in parameters:
            total += parameter.numel()
            if name != "vae":  # it leaves the device once the latents are cached
                weights += parameter.numel() * (4 if id(parameter) in ids else frozen_size) // num_shards
    if training.mixed_precision != "no" and shards == 1:
        weights += trainable * 2  # autograd saves autocast's half-precision copies of trained weights
    moment_size = OPTIMIZER_STATE_BYTES.get(training.optimizer, 8)
    return MemoryEstimate(
        weights=weights,
        gradients=trainable * 4 // shards,  # float32
        optimizer_state=trainable * moment_size // shards,
        ema=trainable * 4 // shards if training.ema_decay else 0,
        activations=count_activations(model, training),
        trainable_parameters=trainable,
        total_parameters=total,
    )


def build_meta_model(folder: Path, config: DiffusionConfig) -> DiffusionModel:
    """Return the family's model on the meta device, without tokenizers."""
    family = find_family(config.family)
    names = (*family.text_encoder_names, family.denoiser_name, "vae")
    components: dict[str, Any] = {}
    for name, component_class in find_classes(folder, names, denoiser_class=family.denoiser_class).items():
        # Parameters created in this context have a shape and dtype, but no storage.
        with META:
            if issubclass(component_class, transformers.PreTrainedModel):
                components[name] = component_class(component_class.config_class.from_pretrained(folder / name))
            else:
                components[name] = component_class.from_config(component_class.load_config(folder / name))
    # The mixin comes first in the MRO, so that its methods override the family's.
    empty: Any = type(f"Empty{family.__name__}", (NoTokenizers, family), {})
    model: DiffusionModel = empty(components, family.load_noise(folder), config, device=META)
    return model


def mark_trainable(model: DiffusionModel, training: TrainingConfig) -> list[nn.Parameter]:
    """Mark the method's parameters as trainable and return them; mirrors `methods.prepare` without tokenizers."""
    from tasks.diffusion.lora.adapters import add_lora

    trained: list[nn.Parameter] = []
    names = list(model.trainable_modules(train_text_encoder=training.train_text_encoder))
    names = [name for name in names if training.train_denoiser or name != model.denoiser_name]
    if training.method.endswith("lora"):
        if not hasattr(model.denoiser, "peft_config"):  # a second LoRA method reuses the adapters
            with META:
                add_lora(model, names, make_lora_hyperparameters(training.lora))
        # By name: `requires_grad` has been reset by `estimate_methods` where adapters are reused.
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
            # Gradients of the token flow through the whole encoder, which therefore saves its activations.
            table.requires_grad_(True)
            vectors = torch.empty(training.textual_inversion.num_vectors, table.weight.shape[1], device=META)
            # The flag on the table serves autograd alone: its rows are not trained.
            trained = [parameter for parameter in trained if parameter is not table.weight]
            trained.append(nn.Parameter(vectors))
    return trained


def count_activations(model: DiffusionModel, training: TrainingConfig) -> int:
    """Return the bytes that autograd saves in one forward for the backward."""
    rows = count_rows(training)
    if training.gradient_checkpointing:
        model.denoiser.train()
        model.denoiser.enable_gradient_checkpointing()
    # One spatial halving per VAE level but the first: h = H / 2^(levels - 1).
    channels = int(model.vae.config.latent_channels)
    side = model.config.resolution // 2 ** (len(model.vae.config.block_out_channels) - 1)
    latents = torch.zeros(rows, channels, side, side, device=META)
    timesteps = torch.zeros(rows, device=META)
    modules = [part for part in model.components.values() if isinstance(part, nn.Module)]
    # By storage, so that views count once; saved weights are counted elsewhere.
    weights = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # references keep the addresses from being reused

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), flash_attention():
        conditioning = encode_empty(model, rows)
        model.predict(latents, timesteps, conditioning, time_ids=torch.zeros(rows, 6, device=META))
    total = sum(storage.nbytes() for storage in kept.values())
    # Autocast halves most saved tensors; some operations, such as normalization, save float32.
    return total if training.mixed_precision == "no" else int(total * 0.55)


class FlashAttention(torch.autograd.Function):
    """Saves what a fused attention kernel saves: inputs and output, but no attention matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: PLR0917 - autograd's hook
        """Return an output of the right shape."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """Raise RuntimeError: meta tensors are only run forward."""
        raise RuntimeError("an estimate has no numbers to run backward with")


@contextmanager
def flash_attention() -> Iterator[None]:
    """Patch attention to save what fused kernels save; on the meta device torch dispatches to the unfused one."""
    plain = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return FlashAttention.apply(query, key, value)  # type: ignore[no-any-return, no-untyped-call]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def encode_empty(model: DiffusionModel, rows: int) -> Conditioning:
    """Return the conditioning of placeholder token ids, which have the right shape alone."""
    length = sum(model.max_length(name) for name in model.text_encoders)
    return model.encode_prompts(torch.zeros(rows, length, dtype=torch.long, device=META))


class NoTokenizers:
    """Token limits for meta-device models, which have no tokenizers."""

    max_lengths: dict[str, int]
    components: dict[str, Any]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return ids of -1, which equal no prompt's: SDXL compares prompts with the empty one."""
        length = sum(self.max_length(name) for name in self.components if name.startswith("text_encoder"))
        return torch.full((len(prompts), length), -1, device=META)

    def max_length(self, name: str) -> int:
        """Return the family's limit, or the encoder's own."""
        return self.max_lengths.get(name) or int(self.components[name].config.max_position_embeddings)
