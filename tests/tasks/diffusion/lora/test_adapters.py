"""A saved adapter changes a fresh model as it changed the trained one, whatever layers it adapts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.lora.adapters import LoraHyperparameters, add_lora, check_saved_lora, save_lora
from tasks.diffusion.registry import load_model
from tasks.diffusion.types import LORA_FILE
from tasks.errors import AdapterSaveFailed, ConfigError
from tests.support.tiny_families import MAKERS, family_config, open_family
from tests.support.tiny_lora import EXPORT, TARGETS, adapt, predict

CASES = [(family, kind, use_dora) for family, kinds in TARGETS.items() for kind in kinds for use_dora in (False, True)]


@dataclass
class Reader:
    """A pipeline that knows nothing of training, and our model around its parts."""

    pipeline: Any
    model: DiffusionModel

    def predict(self, folder: Path, weight_name: str = LORA_FILE) -> torch.Tensor:
        """Load a file as a person would, predict, and take it out again."""
        self.pipeline.load_lora_weights(folder, weight_name=weight_name)
        prediction = predict(self.model)
        self.pipeline.unload_lora_weights()
        return prediction


@pytest.fixture(scope="module")
def readers(folders: dict[str, Path]) -> dict[str, Reader]:
    found = {}
    for family, folder in folders.items():
        pipeline, model = diffusers.DiffusionPipeline.from_pretrained(folder), open_family(family, folder)
        model.components |= {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        found[family] = Reader(pipeline, model)
    return found


@pytest.mark.parametrize(("family", "kind", "use_dora"), CASES)
def test_an_adapter_on_any_layer_type_predicts_the_same_in_diffusers(
    folders: dict[str, Path], readers: dict[str, Reader], tmp_path: Path, family: str, kind: str, use_dora: bool
) -> None:
    model = open_family(family, folders[family])
    plain = predict(model)
    names = adapt(model, TARGETS[family][kind], use_dora=use_dora)
    trained = predict(model)
    save_lora(model, tmp_path, names, export=EXPORT)
    assert (trained - plain).abs().max() > 1e-3
    # The same products in float32, but the scale is folded into one factor: a few roundings per layer.
    tolerance = {"rtol": 1e-3, "atol": 1e-4 * float(trained.abs().max())}
    torch.testing.assert_close(readers[family].predict(tmp_path), trained, **tolerance)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("family", MAKERS)
def test_a_loaded_model_applies_the_saved_adapter(
    folders: dict[str, Path], tmp_path: Path, family: str, use_dora: bool
) -> None:
    model = open_family(family, folders[family])
    save_lora(model, tmp_path, adapt(model, ("to_q", "ff.net.2"), use_dora=use_dora), export=EXPORT)
    opened = load_model(family_config(family, folders[family]), folder=tmp_path)
    assert isinstance(opened, DiffusionModel)
    trained = predict(model)
    torch.testing.assert_close(predict(opened), trained, rtol=1e-3, atol=1e-4 * float(trained.abs().max()))
    tensors = load_file(tmp_path / LORA_FILE)
    key = next(key for key in tensors if ".ff.net.2.lora_A" in key)
    tensors[key.replace(".lora_A.", ".lora.down.")] = tensors.pop(key)
    save_file(tensors, tmp_path / LORA_FILE)
    with pytest.raises(AdapterSaveFailed, match="tensors of"):
        load_model(family_config(family, folders[family]), folder=tmp_path)


@pytest.mark.parametrize("family", MAKERS)
def test_state_dict_keys_use_the_peft_format_throughout(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    model = open_family(family, folders[family])
    targets = ("to_q", "ff.net.2")
    save_lora(model, tmp_path, adapt(model, targets), export=EXPORT)
    keys = load_file(tmp_path / LORA_FILE)
    assert {key.rsplit(".lora_", 1)[1] for key in keys} == {"A.weight", "B.weight"}
    assert any(".ff.net.2.lora_A" in key for key in keys)


@pytest.mark.parametrize("family", MAKERS)
def test_verification_detects_missing_changed_and_wrongly_scaled_layers(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    model = open_family(family, folders[family])
    names = adapt(model, ("to_q", "ff.net.2"))
    save_lora(model, tmp_path, names, export=EXPORT)
    tensors = load_file(tmp_path / LORA_FILE)
    key = next(key for key in tensors if key.startswith(model.denoiser_name) and "lora_B" in key)
    layer = key.removesuffix(".lora_B.weight")
    lost = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{layer}.")}
    mixed = {name.replace(".ff.net.2.lora_A.", ".ff.net.2.lora.down."): tensor for name, tensor in tensors.items()}
    changed = {**tensors, key: tensors[key] + 0.5}
    halved = {name: tensor / 2 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    for damaged in (lost, mixed, changed, halved):
        save_file(damaged, tmp_path / LORA_FILE, metadata={"format": "pt"})
        with pytest.raises(AdapterSaveFailed, match=LORA_FILE):
            check_saved_lora(model, tmp_path, names, export=EXPORT)


def test_verification_leaves_the_trained_adapter_unchanged(folders: dict[str, Path], tmp_path: Path) -> None:
    model = open_family("stable_diffusion", folders["stable_diffusion"])
    names = adapt(model)
    before = {key: value.clone() for key, value in model.denoiser.state_dict().items()}
    save_lora(model, tmp_path, names, export=EXPORT)
    after = model.denoiser.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_unmatched_target_modules_raise_an_error_naming_the_setting(folders: dict[str, Path]) -> None:
    model = open_family("stable_diffusion", folders["stable_diffusion"])
    for targets in (("no_such_layer",), ("norm1",)):
        with pytest.raises(ConfigError, match="training.lora.target_modules"):
            add_lora(model, ["unet"], LoraHyperparameters(rank=2, lora_alpha=2.0, target_modules=targets))


def test_lora_scale_scales_the_adapters_effect(folders: dict[str, Path], tmp_path: Path) -> None:
    family = "stable_diffusion"
    model = open_family(family, folders[family])
    save_lora(model, tmp_path, adapt(model, ("to_q", "to_v")), export=EXPORT)
    config, plain = family_config(family, folders[family]), open_family(family, folders[family])

    def change(scale: float) -> torch.Tensor:
        tuned = load_model(config, folder=tmp_path, lora_scale=scale)
        key = next(key for key in tuned.denoiser.state_dict() if key.endswith("to_q.weight"))
        found: torch.Tensor = tuned.denoiser.state_dict()[key] - plain.denoiser.state_dict()[key]
        return found

    assert float(change(1.0).abs().max()) > 1e-3
    # float32 weights plus a product in float32: one rounding each.
    torch.testing.assert_close(change(0.5), change(1.0) / 2, rtol=1e-3, atol=1e-6)
    assert float(change(0.0).abs().max()) < 1e-6
