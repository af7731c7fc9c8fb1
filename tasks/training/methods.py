"""Training methods: full fine-tuning, LoRA, textual inversion, or the latter with one of the others."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tasks.diffusion.adapter import DTYPES, DiffusionModel
from tasks.diffusion.textual_inversion import initial_vectors, save_tokens
from tasks.errors import ConfigError
from tasks.training.config import LoraSettings
from tasks.training.process.worker_spec import TrainingSpec

if TYPE_CHECKING:
    from tasks.diffusion.lora.adapters import LoraHyperparameters


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate, trained in the steps `first_step <= step < end_step`."""

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float
    first_step: int = 0
    end_step: int | None = None

    def is_active(self, step: int) -> bool:
        """Whether the group is trained at an optimizer step, counted from 0."""
        return step >= self.first_step and (self.end_step is None or step < self.end_step)


@dataclass
class Trainable:
    """The modules that contain trained parameters, and these parameters by learning rate."""

    modules: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    groups: list[ParameterGroup] = field(default_factory=list)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield trained parameters with names `<component>.<path>`, in a stable order."""
        for name, parameter in self.modules.named_parameters():
            if parameter.requires_grad:
                yield name, parameter


def prepare(model: DiffusionModel, spec: TrainingSpec) -> Trainable:
    """Make the configured method's parameters trainable and freeze all others; may cast frozen weights.

    Raises:
        ConfigError: nothing would be trained.

    """
    training = spec.training
    torch.manual_seed(spec.seed)  # PEFT initializes lora_A at random
    trainable = Trainable()
    components = names_of_components(model, spec)
    switch = training.textual_inversion.switch_step if training.method.startswith("textual_inversion") else 0
    if training.method.endswith("full"):
        add_full(model, spec, trainable, components=components, first_step=switch)
    if training.method.endswith("lora"):
        add_adapters(model, spec, trainable, components=components, first_step=switch)
    # After the others: it moves the embedding table out of their parameter groups.
    if training.method.startswith("textual_inversion"):
        add_textual_inversion(model, spec, trainable)
    if not any(group.parameters for group in trainable.groups):
        raise ConfigError("nothing would be trained: set training.train_denoiser or training.train_text_encoder")
    # Last, when `requires_grad` is final: trained parameters stay in float32.
    if training.weight_dtype != "fp32":
        for name, component in model.components.items():
            if (
                isinstance(component, nn.Module) and name != "vae"
            ):  # runs once, before training; SDXL's overflows in fp16
                cast_frozen(component, DTYPES[training.weight_dtype])
    return trainable


def names_of_components(model: DiffusionModel, spec: TrainingSpec) -> list[str]:
    """Return the components whose weights or adapters are trained."""
    names = list(model.trainable_modules(train_text_encoder=spec.training.train_text_encoder))
    return [name for name in names if spec.training.train_denoiser or name != model.denoiser_name]


def add_full(
    model: DiffusionModel, spec: TrainingSpec, trainable: Trainable, *, components: list[str], first_step: int
) -> None:
    """Train all weights of the components."""
    training = spec.training
    for name in components:
        module = model.components[name]
        module.requires_grad_(True).train()
        trainable.modules[name] = module
        is_denoiser = name == model.denoiser_name
        rate = training.learning_rate if is_denoiser else training.text_encoder_learning_rate
        group = ParameterGroup(name, list(module.parameters()), rate or training.learning_rate, first_step)
        trainable.groups.append(group)


def add_adapters(
    model: DiffusionModel, spec: TrainingSpec, trainable: Trainable, *, components: list[str], first_step: int
) -> None:
    """Add LoRA layers to the components and train them."""
    from tasks.diffusion.lora.adapters import add_lora

    lora = spec.training.lora
    adapted = add_lora(model, components, make_lora_hyperparameters(lora))
    for name, module in adapted.items():
        module.train()
        trainable.modules[name] = module
        rate = lora.learning_rate if name == model.denoiser_name else lora.text_encoder_learning_rate
        parameters = [p for p in module.parameters() if p.requires_grad]
        trainable.groups.append(ParameterGroup(name, parameters, rate or lora.learning_rate, first_step))


def make_lora_hyperparameters(lora: LoraSettings) -> "LoraHyperparameters":
    """Return the configured LoRA hyper-parameters."""
    from tasks.diffusion.lora.adapters import LoraHyperparameters

    return LoraHyperparameters(
        rank=lora.rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_dora=lora.use_dora,
        target_modules=lora.target_modules,
    )


def add_textual_inversion(model: DiffusionModel, spec: TrainingSpec, trainable: Trainable) -> None:
    """Add placeholder tokens to every CLIP text encoder and train their embeddings.

    Raises:
        ConfigError: there is no CLIP text encoder, or the token is in its vocabulary.

    """
    token = spec.training.textual_inversion
    words = token.initializer_token or spec.class_noun
    # CLIP encoders alone: `trainable_modules` excludes T5.
    names = [n for n in model.trainable_modules(train_text_encoder=True) if n != model.denoiser_name]
    if not names:
        raise ConfigError("this model has no CLIP text encoder to learn a token in; set training/method=lora")
    vectors = {
        name: initial_vectors(model.tokenizers[name], model.components[name], words, num_vectors=token.num_vectors)
        for name in names
    }
    # A switch step of 0 means no switch. Without another method there is nothing to switch to.
    end = token.switch_step or None if spec.training.method != "textual_inversion" else None
    # Checked here, since `add_placeholder_tokens` accepts known tokens, as a saved full model has them.
    if any(f"<{spec.identifier_token}>" in model.tokenizers[name].get_vocab() for name in names):
        raise ConfigError(f"the base model already knows <{spec.identifier_token}>; set subject.identifier_token")
    for name, learned in model.add_placeholder_tokens(spec.identifier_token, vectors).items():
        learned.to(model.device).train()
        # Full training of the text encoder has unfrozen the table; only the new rows are trained.
        learned.table.requires_grad_(False)
        # A trained text encoder already contains it as its input embedding: no parameter is registered twice.
        if name not in trainable.modules:
            trainable.modules[f"{name}_token"] = learned
        group = ParameterGroup(f"{name}_token", [learned.vectors], token.learning_rate, 0, end)
        others = [drop_from(g, learned.vectors, learned.table.weight) for g in trainable.groups]
        trainable.groups = [*others, group]


def drop_from(group: ParameterGroup, *parameters: torch.Tensor) -> ParameterGroup:
    """Return the group without some parameters, compared by identity."""
    # `in` would compare tensors by element.
    ids = {id(parameter) for parameter in parameters}
    kept = [parameter for parameter in group.parameters if id(parameter) not in ids]
    return ParameterGroup(group.name, kept, group.learning_rate, group.first_step, group.end_step)


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen floating-point parameters in place; trained ones stay in float32."""
    for parameter in module.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def save_learned(model: DiffusionModel, spec: TrainingSpec, trainable: Trainable, *, folder: Path) -> None:
    """Write the result: a diffusers folder for full methods, else LoRA weights and learned embeddings."""
    training = spec.training
    # `merge_token_embeddings` below clears `learned`.
    vectors = {name: learned.vectors for name, learned in model.learned.items()}
    if vectors:
        save_tokens(folder, spec.identifier_token, vectors)
    if training.method.endswith("lora"):
        from tasks.diffusion.lora.adapters import LoraExport, save_lora

        names = [name for name in trainable.modules if not name.endswith("_token")]  # token modules hold no adapter
        subject = f"{spec.identifier_token} {spec.class_noun}"
        export = LoraExport(
            training.lora.lora_alpha, training.lora.save_precision, title=subject, trigger_phrase=subject
        )
        save_lora(model, folder, names, export=export)
    if training.method.endswith("full"):
        # `from_pretrained` knows ordinary embedding tables only.
        model.merge_token_embeddings()
        model.save(folder)
