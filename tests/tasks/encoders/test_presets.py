"""Presets of encoders: pinned, and each architecture loads with all of its weights or is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from conf.compose import compile_request
from conf.overrides import parse_overrides
from tasks.diffusion.hub import MINI_FOLDER
from tasks.encoders.config import EncoderConfig
from tasks.encoders.embeddings import Encoders
from tasks.encoders.folders import CLASSES, find_encoders
from tasks.errors import ConfigError
from tests.support.config import make_config
from tests.support.tiny import draw_photo

CPU = torch.device("cpu")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CROPPED = {**IMAGENET, "size": {"shortest_edge": 40}, "crop_size": {"height": 28, "width": 28}, "resample": 3}
"""As DINOv2's, smaller."""
ARCHITECTURES = {
    "vit": ("ViTConfig", {"image_size": 32, "patch_size": 16}),
    "dinov2": ("Dinov2Config", {"image_size": 28, "patch_size": 14, "mlp_ratio": 2}),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", {"image_size": 28, "patch_size": 14, "mlp_ratio": 2}),
    "dinov3_vit": ("DINOv3ViTConfig", {"image_size": 32, "patch_size": 16, "num_register_tokens": 4}),
}


def make_dino(folder: Path, kind: str) -> Path:
    """Write a tiny encoder of the true architecture with random weights."""
    config_class, changes = ARCHITECTURES[kind]
    torch.manual_seed(0)
    values = {key: value for key, value in TINY.items() if key != "intermediate_size" or "mlp_ratio" not in changes}
    config = getattr(transformers, config_class)(**{**values, **changes})
    extra = {"add_pooling_layer": False} if kind == "vit" else {}
    getattr(transformers, CLASSES["dino"][kind])(config, **extra).save_pretrained(folder)
    plain = {**IMAGENET, "size": {"height": 32, "width": 32}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(CROPPED if "dinov2" in kind else plain))
    return folder


def encoder_config(**changes: object) -> EncoderConfig:
    return make_config(EncoderConfig, **{"clip": "mini", "dino": "mini", "dino_resize": None, **changes})


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_supported_dino_embeds_by_its_cls_token(tmp_path: Path, kind: str) -> None:
    folder = make_dino(tmp_path / kind, kind)
    found = Encoders(encoder_config(dino=str(folder)), CPU)
    photos = [draw_photo(0, size=64), draw_photo(1, size=64)]
    rows = found.encode_dino(photos)
    assert rows.shape == (2, 16)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    assert not torch.allclose(rows[0], rows[1], atol=1e-4)
    pixels = torch.stack([found.dino_preprocess(photo) for photo in photos])
    reference = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = reference(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(rows, torch.nn.functional.normalize(theirs, dim=1), rtol=1e-4, atol=1e-5)


def test_a_larger_clip_of_another_width_embeds_pictures_and_texts_in_one_space(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MINI_FOLDER / "clip")
    text = CLIPTextConfig(
        **TINY, vocab_size=len(tokenizer), max_position_embeddings=20, projection_dim=24,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(**{**TINY, "hidden_size": 32}, image_size=28, patch_size=14, projection_dim=24)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    CLIPModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CROPPED))
    found = Encoders(encoder_config(clip=str(tmp_path)), CPU)
    assert found.encode_clip([draw_photo(0, size=64)]).shape == (1, 24)
    assert found.encode_texts(["a photo of a fish"]).shape == (1, 24)


def test_an_encoder_whose_weights_are_missing_is_refused_instead_of_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_dino(tmp_path / "dino", "dinov2")
    tensors = load_file(folder / "model.safetensors")
    dropped = next(name for name in tensors if "attention" in name and "weight" in name)
    save_file({name: value for name, value in tensors.items() if name != dropped}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks 1 weights of a Dinov2Model \(encoder.layer.0"):
        Encoders(encoder_config(dino=str(folder)), CPU)


@pytest.mark.parametrize("config", ['{"model_type": "siglip"}', '{"model_type": 3}', "[]", "{", "{}"])
def test_an_unsupported_architecture_is_named_before_anything_is_loaded(tmp_path: Path, config: str) -> None:
    for kind, folder in (("clip", tmp_path / "clip"), ("dino", tmp_path / "dino")):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"")
        (folder / "config.json").write_text(config)
        (folder / "preprocessor_config.json").write_text(json.dumps(CROPPED))
        with pytest.raises(ConfigError, match=r"config.json.*see evaluation.encoders") as caught:
            find_encoders(encoder_config(**{kind: str(folder)}))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "clip", "dino"),
    [
        ("paper", "openai/clip-vit-base-patch32", "facebook/dino-vits16"),
        ("modern", "openai/clip-vit-large-patch14", "facebook/dinov2-base"),
        ("mini", "mini", "mini"),
    ],
)
def test_a_preset_pins_its_encoders_whatever_the_base_model(option: str, clip: str, dino: str) -> None:
    for words in (["diffusion=mini"], ["diffusion=sd15", "llm=openai", "subject.source=.", "subject.class_noun=dog"]):
        found = compile_request(parse_overrides([*words, f"evaluation/encoders={option}"])).evaluation.encoders
        assert (found.clip, found.dino) == (clip, dino)
        for revision in (found.clip_revision, found.dino_revision):
            assert revision is None if option == "mini" else re.fullmatch("[0-9a-f]{40}", str(revision))


def test_auto_takes_the_encoders_of_the_base_model() -> None:
    assert compile_request(parse_overrides([])).evaluation.encoders.clip == "mini"
    words = ["diffusion=sd15", "llm=openai", "subject.source=.", "subject.class_noun=dog"]
    assert compile_request(parse_overrides(words)).evaluation.encoders.dino == "facebook/dino-vits16"


@pytest.mark.parametrize("option", ["paper", "modern"])
def test_encoders_that_are_not_cached_are_one_line_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = compile_request(parse_overrides([f"evaluation/encoders={option}"])).evaluation.encoders
    with pytest.raises(ConfigError, match=r"no encoder at openai/clip-vit-\S+: it is not cached and the hub") as caught:
        find_encoders(config)
    assert "\n" not in str(caught.value)
    assert "evaluation/encoders=mini" in str(caught.value)
