"""Models of other trainers: loaded whole, or refused with the name of what doesn't fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.diffusion.external.conversion import convert
from tasks.diffusion.external.detection import detect
from tasks.diffusion.lora.adapters import KOHYA_FILE, save_lora
from tasks.diffusion.registry import load_model
from tasks.diffusion.types import LORA_FILE
from tasks.errors import ConfigError
from tests.support.tiny_families import family_config, open_family
from tests.support.tiny_lora import EXPORT, adapt, predict

FAMILY = "stable_diffusion"


@pytest.fixture
def trained(folders: dict[str, Path], tmp_path: Path) -> torch.Tensor:
    """A LoRA in both formats in `tmp_path/lora`; its prediction."""
    model = open_family(FAMILY, folders[FAMILY])
    save_lora(model, tmp_path / "lora", adapt(model, ("to_q", "to_out.0", "ff.net.2")), export=EXPORT)
    return predict(model)


def import_model(path: Path, folders: dict[str, Path], out: Path, *, family: str = FAMILY) -> Path:
    convert(detect(str(path)), family_config(family, folders[family]), out, identifier_token="zwx")
    return out


def test_a_lora_loads_for_a_base_model_in_half_precision(
    folders: dict[str, Path], tmp_path: Path, trained: torch.Tensor
) -> None:
    config = family_config(FAMILY, folders[FAMILY]).model_copy(update={"precision": "bf16"})
    convert(detect(str(tmp_path / "lora" / LORA_FILE)), config, tmp_path / "out", identifier_token="zwx")
    stored, written = (load_file(folder / LORA_FILE) for folder in (tmp_path / "lora", tmp_path / "out"))
    assert written.keys() == stored.keys()
    down = next(key for key in stored if ".lora_A." in key)
    assert torch.equal(written[down], stored[down].bfloat16().float())


@pytest.mark.parametrize("name", [LORA_FILE, KOHYA_FILE])
def test_a_lora_in_the_keys_of_diffusers_and_of_kohya_predicts_as_it_was_trained(
    folders: dict[str, Path], tmp_path: Path, trained: torch.Tensor, name: str
) -> None:
    out = import_model(tmp_path / "lora" / name, folders, tmp_path / "out")
    opened = load_model(family_config(FAMILY, folders[FAMILY]), folder=out)
    plain = predict(open_family(FAMILY, folders[FAMILY]))
    assert (trained - plain).abs().max() > 1e-3
    # The scale alpha / rank is folded into one factor: a few float32 roundings per layer.
    torch.testing.assert_close(predict(opened), trained, rtol=1e-3, atol=1e-4 * float(trained.abs().max()))


@pytest.mark.parametrize("name", [LORA_FILE, KOHYA_FILE])
def test_a_lora_for_another_family_names_the_file_and_the_base(
    folders: dict[str, Path], tmp_path: Path, trained: torch.Tensor, name: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.* doesn't fit the base model flux-1") as caught:
        import_model(tmp_path / "lora" / name, folders, tmp_path / "out", family="flux")
    assert "\n" not in str(caught.value)


def test_keys_that_diffusers_would_skip_are_named(
    folders: dict[str, Path], tmp_path: Path, trained: torch.Tensor
) -> None:
    tensors = load_file(tmp_path / "lora" / LORA_FILE)
    moved = next(key for key in tensors if key.startswith("unet") and ".lora_A." in key)
    path = moved.split(".lora_A.")[0]
    for side in ("A", "B"):
        tensors[f"unet.nowhere.lora_{side}.weight"] = tensors.pop(f"{path}.lora_{side}.weight") + 1
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ConfigError, match=r"odd.safetensors doesn't fit .*(nowhere)"):
        import_model(tmp_path / "odd.safetensors", folders, tmp_path / "out")


def test_an_embedding_is_stored_under_the_identifier_token(folders: dict[str, Path], tmp_path: Path) -> None:
    model = open_family(FAMILY, folders[FAMILY])
    width = model.components["text_encoder"].get_input_embeddings().weight.shape[1]
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    for name, tensors in (
        ("diffusers", {"<my-cat>": vectors[0]}), ("webui", {"emb_params": vectors}), ("kohya", {"clip_l": vectors}),
    ):  # fmt: skip
        save_file(tensors, tmp_path / f"{name}.safetensors")
        out = import_model(tmp_path / f"{name}.safetensors", folders, tmp_path / name)
        opened = load_model(family_config(FAMILY, folders[FAMILY]), folder=out)
        assert opened.insert_placeholder_tokens(["a zwx cat"], "text_encoder")[0].startswith("a <zwx>")
        table = opened.components["text_encoder"].get_input_embeddings().weight
        torch.testing.assert_close(
            table[-len(vectors[:1] if name == "diffusers" else vectors) :].float().cpu()[0], vectors[0]
        )


def test_an_embedding_of_another_width_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    save_file({"<cat>": torch.zeros(7)}, tmp_path / "e.safetensors")
    with pytest.raises(ConfigError, match=r"e.safetensors doesn't fit .*: vectors of 7 for a text_encoder of"):
        import_model(tmp_path / "e.safetensors", folders, tmp_path / "out")


def test_a_diffusers_folder_is_copied_and_a_missing_or_pickled_part_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    out = import_model(folders[FAMILY], folders, tmp_path / "out")
    assert torch.equal(predict(load_model(family_config(FAMILY, folders[FAMILY]), folder=out)),
                       predict(open_family(FAMILY, folders[FAMILY])))  # fmt: skip
    broken = tmp_path / "broken"
    shutil.copytree(folders[FAMILY], broken)
    [weights] = (broken / "unet").glob("*.safetensors")
    weights.rename(broken / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"unet holds diffusion_pytorch_model.bin, a pickle"):
        import_model(broken, folders, tmp_path / "out")
    shutil.rmtree(broken / "unet")
    with pytest.raises(ConfigError, match=r"unet is missing"):
        import_model(broken, folders, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("lora.pt", None, "lora.pt is a pickle"),
        ("model.onnx", None, "is no model"),
        ("cut.safetensors", b"\x40\0\0\0\0\0\0\0{}", "is no safetensors file"),
        ("loha.safetensors", {"lora_unet_x.hada_w1_a": torch.zeros(1)}, "LyCORIS"),
        ("whole.safetensors", {"model.diffusion_model.x": torch.zeros(1)}, "whole model in one file"),
        ("other.safetensors", {f"layer.{i}": torch.zeros(1) for i in range(9)}, "neither a LoRA nor an embedding"),
    ],
)
def test_what_is_no_supported_model_is_refused_by_name(
    tmp_path: Path, name: str, tensors: dict[str, torch.Tensor] | bytes | None, message: str
) -> None:
    if isinstance(tensors, dict):
        save_file(tensors, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(tensors or b"")
    with pytest.raises(ConfigError, match=message):
        detect(str(tmp_path / name))


def test_folders_without_or_with_several_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no model at"):
        detect(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="neither model_index.json nor"):
        detect(str(tmp_path))
    (tmp_path / "a.bin").touch()
    with pytest.raises(ConfigError, match="holds a.bin, a pickle"):
        detect(str(tmp_path))
    for name in ("a", "b"):
        save_file({"lora": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match="a.safetensors and b.safetensors; name one"):
        detect(str(tmp_path))
