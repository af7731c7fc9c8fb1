"""The saved files under the key rules of other programs, and what is written of them in their headers."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.lora.adapters import KOHYA_FILE, LoraExport, save_lora
from tasks.diffusion.types import LORA_FILE
from tests.support.lora_tools import (
    COMFY,
    KOHYA,
    Reader,
    change,
    group,
    invoke_flux_path,
    original_flux,
    original_sd3,
    resolve_invoke_sdxl,
)
from tests.support.tiny_families import MAKERS, open_family
from tests.support.tiny_lora import EXPORT, TARGETS, adapt

ORIGINAL = {"stable_diffusion_3": original_sd3, "flux": original_flux}
CASES = [(family, kind) for family, kinds in TARGETS.items() for kind in ("attention", *list(kinds)[-3:])]
HALF = LoraExport(alpha=6.0, save_precision="fp16", title="sks fish", trigger_phrase="sks fish")


def read_weights(module: nn.Module, *, is_merged: bool = False) -> dict[str, Tensor]:
    """Return the weights of every layer that may hold an adapter, with the adapter in them or without."""
    found = {}
    for path, layer in module.named_modules():
        if not isinstance(getattr(layer, "weight", None), Tensor) or ".lora_" in path or ".base_layer" in path:
            continue
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        weight = base.weight.detach().clone()
        if is_merged and base is not layer:
            layer.merge()
            weight = base.weight.detach().clone()
            layer.unmerge()
        found[path] = weight
    return found


def by_original_names(family: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return ORIGINAL[family](weights) if family in ORIGINAL else weights


def check_reader(reader: Reader, model: DiffusionModel, path: Path, family: str) -> None:
    """Compare what a program would do to each weight with the trained adapter, merged by PEFT."""
    plain = by_original_names(family, read_weights(model.denoiser))
    merged = by_original_names(family, read_weights(model.denoiser, is_merged=True))
    texts = {name: read_weights(model.components[name]) for name in reader.text_encoders}
    tuned = {name: read_weights(model.components[name], is_merged=True) for name in reader.text_encoders}
    named = {name: {text_path(path): path for path in weights} for name, weights in texts.items()}
    known = reader.keys(plain, named)
    layers = group(load_file(path))
    assert set(layers) <= set(known), f"{reader.name} doesn't know {sorted(set(layers) - set(known))[0]}"
    changed = {known[key]: leaves for key, leaves in layers.items()}
    for weight in plain:
        expected = merged[weight] - plain[weight]
        compare(changed.pop(("denoiser", weight), None), plain[weight], expected, weight)
    for name, paths in named.items():
        for theirs, ours in paths.items():
            expected = tuned[name][ours] - texts[name][ours]
            compare(changed.pop((name, theirs), None), texts[name][ours], expected, f"{name}.{theirs}")
    assert not changed


def text_path(path: str) -> str:
    return path if path.startswith("text_model.") or path == "text_projection" else f"text_model.{path}"


def compare(leaves: dict[str, Tensor] | None, weight: Tensor, expected: Tensor, name: str) -> None:
    found = torch.zeros_like(weight) if leaves is None else change(leaves, weight)
    # float32 products of a few terms, merged and subtracted again: some 1e-6 of the weight's size.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_kohya_file_applies_the_trained_weight_deltas(
    folders: dict[str, Path], tmp_path: Path, family: str, kind: str, use_dora: bool
) -> None:
    model = open_family(family, folders[family])
    save_lora(model, tmp_path, adapt(model, TARGETS[family][kind], use_dora=use_dora), export=EXPORT)
    for reader in (KOHYA[family], COMFY[family]):
        check_reader(reader, model, tmp_path / KOHYA_FILE, family)


def test_invoke_ai_recognizes_the_flux_file(folders: dict[str, Path], tmp_path: Path) -> None:
    model = open_family("flux", folders["flux"])
    save_lora(model, tmp_path, adapt(model), export=EXPORT)
    original = set(original_flux(read_weights(model.denoiser)))
    texts = {text_path(path) for path in read_weights(model.components["text_encoder"])}
    found = {invoke_flux_path(layer) for layer in group(load_file(tmp_path / KOHYA_FILE))}
    assert found <= original | texts
    assert {path.split(".")[0] for path in found} == {"double_blocks", "single_blocks", "text_model"}


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_invoke_ai_resolves_every_underscored_unet_key(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    model = open_family(family, folders[family])
    save_lora(model, tmp_path, adapt(model, TARGETS[family]["convolutions"]), export=EXPORT)
    modules = set(read_weights(model.denoiser))
    layers = [layer for layer in group(load_file(tmp_path / KOHYA_FILE)) if layer.startswith("lora_unet_")]
    assert {resolve_invoke_sdxl(layer, modules) for layer in layers} <= modules


@pytest.mark.parametrize("family", ["stable_diffusion_3", "flux"])
def test_diffusers_files_of_transformer_models_need_no_alpha_in_comfy_ui(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    model = open_family(family, folders[family])
    save_lora(model, tmp_path, adapt(model), export=EXPORT)
    tensors = load_file(tmp_path / LORA_FILE)
    plain, merged = read_weights(model.denoiser), read_weights(model.denoiser, is_merged=True)
    layers = [key.removesuffix(".lora_A.weight") for key in tensors if key.startswith("transformer.") and "_A." in key]
    for layer in layers:  # `transformer.` and diffusers' path; without an alpha the scale is one
        path = layer.removeprefix("transformer.")
        product = tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(product, merged[path] - plain[path], rtol=1e-4, atol=1e-5)
    assert len(layers) > 8


@pytest.mark.parametrize("family", MAKERS)
def test_save_precision_applies_to_all_tensors_but_alpha_and_dora_magnitudes(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    model = open_family(family, folders[family])
    names = adapt(model, use_dora=True)
    for export, expected in ((HALF, torch.float16), (EXPORT, torch.float32)):
        save_lora(model, tmp_path / export.save_precision, names, export=export)
        for file in (LORA_FILE, KOHYA_FILE):
            for key, tensor in load_file(tmp_path / export.save_precision / file).items():
                is_whole = "magnitude" in key or key.endswith(("alpha", "dora_scale"))
                assert tensor.dtype == (torch.float32 if is_whole else expected), key


ARCHITECTURES = {
    "stable_diffusion": ("stable-diffusion-v1", "diffusers"),
    "stable_diffusion_xl": ("stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models"),
    "stable_diffusion_3": ("stable-diffusion-3-m", "diffusers"),
    "flux": ("flux-1-dev", "https://github.com/black-forest-labs/flux"),
}


@pytest.mark.parametrize("family", MAKERS)
def test_headers_follow_modelspec(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    model = open_family(family, folders[family])
    save_lora(model, tmp_path, adapt(model), export=EXPORT)
    architecture, implementation = ARCHITECTURES[family]
    for file in (LORA_FILE, KOHYA_FILE):
        with safe_open(tmp_path / file, "pt") as opened:
            metadata = opened.metadata()
        expected = {
            "sai_model_spec": "1.0.1", "architecture": f"{architecture}/lora", "implementation": implementation,
            "title": "sks fish", "resolution": "32x32", "trigger_phrase": "sks fish",
        }  # fmt: skip
        assert {key: metadata[f"modelspec.{key}"] for key in expected} == expected
        assert str(tmp_path) not in str(metadata)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "6.0")
