"""LoRA (arXiv 2106.09685) on a loaded model: add, save for diffusers and kohya tools, verify, fuse."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from tasks.diffusion.adapter import DTYPES, DiffusionModel
from tasks.diffusion.lora.kohya import to_kohya
from tasks.diffusion.types import LORA_FILE
from tasks.errors import AdapterSaveFailed, ConfigError, first_line
from tasks.stage.tensor_files import save_tensors

KOHYA_FILE = "lora_kohya.safetensors"
CHECK_ADAPTER = "saved"
# Tolerated difference between predictions with the saved and the trained adapter: a fraction of the adapter's own
# effect, plus a fraction of the prediction's norm. Unit roundoff is 2^-11 in fp16 and 2^-8 in bf16, and errors
# accumulate over layers.
CHECK_TOLERANCE = 0.1
ROUNDING = {"fp32": 1e-4, "fp16": 2**-8, "bf16": 2**-5}


@dataclass(frozen=True)
class LoraExport:
    """How an adapter is exported."""

    alpha: float
    save_precision: str
    title: str
    trigger_phrase: str


@dataclass(frozen=True)
class LoraHyperparameters:
    """Hyper-parameters of the adapters, named as in PEFT's `LoraConfig`."""

    rank: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_dora: bool = False
    target_modules: tuple[str, ...] = ()
    """Layers of the denoiser; empty: the family's."""


def add_lora(
    model: DiffusionModel, components: Sequence[str], hyperparameters: LoraHyperparameters
) -> dict[str, nn.Module]:
    """Inject LoRA layers into the named components and return these; base weights stay frozen.

    lora_B starts at zero, so the model is unchanged; lora_A is drawn from torch's global generator.

    Raises:
        ConfigError: a target is not a layer of the denoiser, or one that LoRA can't adapt.

    """
    adapted = {}
    for name in components:
        targets = model.lora_targets[name]
        if name == model.denoiser_name and hyperparameters.target_modules:
            targets = hyperparameters.target_modules
        if name == model.denoiser_name:
            check_targets(model.components[name], targets)
        settings = LoraConfig(
            r=hyperparameters.rank,
            lora_alpha=hyperparameters.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=hyperparameters.lora_dropout,
            use_dora=hyperparameters.use_dora,
            init_lora_weights="gaussian",  # as in diffusers' DreamBooth scripts
            target_modules=list(targets),
        )
        model.components[name].add_adapter(settings)
        for parameter in model.components[name].parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # half precision would round small updates away
        adapted[name] = model.components[name]
    return adapted


def check_targets(module: nn.Module, targets: tuple[str, ...]) -> None:
    """Refuse targets that match no layer, or layers other than Linear and Conv2d. Raises ConfigError."""
    # PEFT matches `target_modules` by suffix as well, but ignores a name without match if another one matches.
    for target in targets:
        found = [layer for path, layer in module.named_modules() if path == target or path.endswith(f".{target}")]
        if not found:
            raise ConfigError(f"training.lora.target_modules: {target} is not a layer of {type(module).__name__}")
        if wrong := [layer for layer in found if not isinstance(layer, nn.Linear | nn.Conv2d)]:
            kind = type(wrong[0]).__name__
            raise ConfigError(f"training.lora.target_modules: {target} is a {kind}; LoRA adapts Linear and Conv2d")


def save_lora(model: DiffusionModel, folder: Path, names: list[str], *, export: LoraExport) -> None:
    """Write the adapter in diffusers' and in kohya's format; then load the former and compare.

    In diffusers' file the scale alpha / rank is folded into lora_B and the metadata says alpha = rank, so that loaders
    with and without support for the metadata agree. kohya's file has alpha as tensors.

    Raises:
        AdapterSaveFailed: the written file doesn't load as the trained adapter.

    """
    tensors: dict[str, Tensor] = {}
    kohya: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for name in names:
        component = model.components[name]
        state = read_adapter(model, name)
        settings = {**component.peft_config["default"].to_dict(), "base_model_name_or_path": None}
        rank = settings["r"]
        # PEFT keeps the targets as a set; sorted, equal runs write equal files.
        settings |= {"target_modules": sorted(settings["target_modules"]), "lora_alpha": rank}
        # diffusers expects the settings of each component under its own prefix.
        config |= {f"{name}.{key}": value for key, value in settings.items()}
        tensors |= {
            f"{name}.{key}": value * (export.alpha / rank) if ".lora_B." in key else value
            for key, value in state.items()
        }
        is_denoiser = name == model.denoiser_name
        prefix = "lora_unet" if is_denoiser else kohya_prefix(model, name)
        layers = model.original_layers if is_denoiser else ()
        # Text encoders have no fused layers, so no base layer is looked up in `source`.
        source = component if is_denoiser else nn.Module()
        kohya |= to_kohya(state, source, prefix=prefix, alpha=export.alpha, layers=layers)
    metadata = make_modelspec_metadata(model, export)
    adapter = json.dumps(config, indent=2, sort_keys=True)
    dtype = DTYPES[export.save_precision]
    save_tensors(cast(tensors, dtype), folder / LORA_FILE, metadata={**metadata, "lora_adapter_metadata": adapter})
    # Header fields by which sd-scripts and its tools show type, rank and alpha of a network.
    network = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(export.alpha)}
    save_tensors(cast(kohya, dtype), folder / KOHYA_FILE, metadata={**metadata, **network})
    check_saved_lora(model, folder, names, export=export)


def read_adapter(model: DiffusionModel, name: str, adapter: str = "default") -> dict[str, Tensor]:
    """Return one component's adapter by PEFT's names, in float32 on the CPU; empty where it is not loaded."""
    if adapter not in getattr(model.components[name], "peft_config", {}):
        return {}
    state = get_peft_model_state_dict(model.components[name], adapter_name=adapter)
    if name in model.text_encoders:
        # transformers 5 removed the `text_model.` level of CLIPTextModel, but tools expect the older names. Its own
        # loader ignores DoRA magnitudes unless their keys end in `.weight`.
        prefix = "" if hasattr(model.components[name], "text_model") else "text_model."
        state = {f"{prefix}{key}.weight" if key.endswith("lora_magnitude_vector") else f"{prefix}{key}": value
                 for key, value in state.items()}  # fmt: skip
    # diffusers' loader leaves tensors on the meta device for which the file has no key.
    return {key: value.detach().float().cpu() for key, value in state.items() if not value.is_meta}


def kohya_prefix(model: DiffusionModel, name: str) -> str:
    """Return kohya's prefix of a text encoder: `lora_te`, or `lora_te1` and so on where there are several."""
    if len(model.text_encoder_names) == 1:
        return "lora_te"
    return f"lora_te{model.text_encoder_names.index(name) + 1}"


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast tensors to the storage dtype; alpha and DoRA magnitudes, which scale whole rows, stay in float32."""
    whole = ("lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale", "alpha")
    return {key: value.to(torch.float32 if key.endswith(whole) else dtype).contiguous()
            for key, value in tensors.items()}  # fmt: skip


def make_modelspec_metadata(model: DiffusionModel, export: LoraExport) -> dict[str, str]:
    """Return ModelSpec 1.0.1 metadata, without a date: equal runs write equal files."""
    side = model.config.resolution
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(getattr(model.noise_scheduler, "prediction_type", ""))
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{model.architecture}/lora",
        "modelspec.implementation": model.implementation,
        "modelspec.title": export.title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.trigger_phrase": export.trigger_phrase,
        "modelspec.usage_hint": f"write {export.trigger_phrase} in the prompt",
        **({"modelspec.prediction_type": prediction} if prediction else {}),
    }


def check_saved_lora(model: DiffusionModel, folder: Path, names: list[str], *, export: LoraExport) -> None:
    """Load the file through diffusers as a second adapter and compare keys, weights and a prediction.

    Raises:
        AdapterSaveFailed: names the file and the difference.

    """
    load_as_adapter(model, folder, CHECK_ADAPTER)
    try:
        for name in names:
            compare_weights(model, name, folder / LORA_FILE, export=export)
        compare_predictions(model, names, folder / LORA_FILE, export=export)
    finally:
        # The trained adapter is active again even after a failure.
        for name in names:
            component = model.components[name]
            component.enable_adapters()
            component.set_adapter("default")
            if CHECK_ADAPTER in component.peft_config:
                # diffusers has `delete_adapters`, transformers `delete_adapter`.
                (component.delete_adapters if name == model.denoiser_name else component.delete_adapter)(CHECK_ADAPTER)


def load_as_adapter(model: DiffusionModel, folder: Path, adapter: str) -> None:
    """Load a LoRA file as a named adapter through `load_lora_weights`. Raises AdapterSaveFailed where that fails."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`", category=UserWarning)
            model.make_pipeline().load_lora_weights(folder, weight_name=LORA_FILE, adapter_name=adapter)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = first_line(error)
        raise AdapterSaveFailed(f"{folder / LORA_FILE} can't be loaded by diffusers: {reason}") from error


def compare_weights(model: DiffusionModel, name: str, path: Path, *, export: LoraExport) -> None:
    """Compare a component's loaded adapter with the trained one, up to the rounding of the file's dtype.

    Raises:
        AdapterSaveFailed: a tensor is missing or differs.

    """
    trained, loaded = read_adapter(model, name), read_adapter(model, name, CHECK_ADAPTER)
    if missing := sorted(set(trained) - set(loaded)):
        raise AdapterSaveFailed(
            f"{path}: {len(missing)} of {len(trained)} tensors of {name} don't load (first {missing[0]}); "
            "choose other training.lora.target_modules"
        )
    # The two adapters scale lora_B by their own alpha / r: compare products, not raw tensors.
    scales = [model.components[name].peft_config[key] for key in ("default", CHECK_ADAPTER)]
    factor = scales[0].lora_alpha / scales[0].r / (scales[1].lora_alpha / scales[1].r)
    expected = {key: value * factor if ".lora_B." in key else value for key, value in trained.items()}
    for key, value in cast(expected, DTYPES[export.save_precision]).items():
        # The factor is applied in float32 on both sides, and each is rounded once.
        if not torch.allclose(loaded[key], value.float(), rtol=2**-7, atol=1e-6):
            raise AdapterSaveFailed(f"{path}: {name}.{key} loads with weights that differ from the trained ones")


@torch.no_grad()
def compare_predictions(model: DiffusionModel, names: list[str], path: Path, *, export: LoraExport) -> None:
    """Compare the denoiser's predictions with both adapters on one fixed noisy latent.

    Raises:
        AdapterSaveFailed: they differ by more than rounding explains.

    """
    components = [model.components[name] for name in names]
    modes = [component.training for component in components]
    for component in components:
        component.eval()  # LoRA dropout would differ between the predictions
    predictions = {}
    for adapter in ("default", CHECK_ADAPTER, None):
        for component in components:
            component.disable_adapters() if adapter is None else component.set_adapter(adapter)
        predictions[adapter] = predict_once(model)
    for component, mode in zip(components, modes, strict=True):
        component.enable_adapters()
        component.train(mode)
    trained, saved, plain = predictions.values()
    # The coarser of the file's dtype and those that the components compute in.
    precision = max((export.save_precision, *precisions(components)), key=lambda name: ROUNDING[name])
    allowed = CHECK_TOLERANCE * (trained - plain).norm() + ROUNDING[precision] * trained.norm()
    if not (saved - trained).norm() <= allowed:  # negated, so that NaN fails
        raise AdapterSaveFailed(f"{path} gives other predictions than the trained adapter")


def precisions(components: list[nn.Module]) -> set[str]:
    """Return the dtypes of modules' parameters, by their configuration names."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {names[p.dtype] for component in components for p in component.parameters() if p.dtype in names}


def predict_once(model: DiffusionModel) -> Tensor:
    """Return one prediction in float32 `(1, C, h, w)`, h and w at most 16, for fixed noise and prompt."""
    # The dtype of the frozen weights: adapters themselves are in float32.
    weight = next(p for p in model.denoiser.parameters() if not p.requires_grad)
    full = model.config.resolution // 2 ** (len(model.vae.config.block_out_channels) - 1)
    side = min(16, full)
    shape = (1, int(model.vae.config.latent_channels), side, side)
    # A CPU generator: the global one stays as it is.
    noisy = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, weight.dtype)
    timesteps = model.noise_scheduler.sample_timesteps(torch.tensor([0.5])).to(model.device)
    conditioning = model.encode_prompts(model.tokenize(["a photo"]))
    time_ids = torch.tensor([[8.0 * side, 8 * side, 0, 0, 8 * side, 8 * side]], device=model.device)
    return model.predict(noisy, timesteps, conditioning, time_ids=time_ids).float()


@torch.no_grad()
def fuse_lora(model: DiffusionModel, folder: Path, *, scale: float = 1.0) -> None:
    """Merge a saved adapter, times `scale`, into the weights, through diffusers' loader.

    Raises:
        AdapterSaveFailed: the loader ignores tensors of the file.

    """
    stored = load_file(folder / LORA_FILE)
    names = sorted({key.split(".")[0] for key in stored})
    load_as_adapter(model, folder, CHECK_ADAPTER)
    for name in names:
        # diffusers skips keys that it doesn't know without an error, so every tensor is compared.
        held = {key: value for key, value in stored.items() if key.startswith(f"{name}.")}
        loaded = read_adapter(model, name, CHECK_ADAPTER)
        found = [key for key, value in held.items()
                 if torch.equal(loaded.get(key.removeprefix(f"{name}."), torch.empty(0)), value.float())]  # fmt: skip
        if len(found) != len(held):
            raise AdapterSaveFailed(f"{folder / LORA_FILE}: {len(found)} of {len(held)} tensors of {name} load")
        for key, parameter in model.components[name].named_parameters():
            if ".lora_" in key:
                parameter.data = parameter.data.float()  # else lora_B @ lora_A is rounded before it is added
    pipeline = model.make_pipeline()
    pipeline.fuse_lora(components=names, lora_scale=scale)  # Flux's default omits the text encoder
    pipeline.unload_lora_weights()
