"""Encoders are found before anything is computed, and read without running anything they hold."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from tasks.diffusion.hub import MINI_FOLDER
from tasks.encoders.config import EncoderConfig
from tasks.encoders.embeddings import Encoders, Preprocessor
from tasks.encoders.folders import find_encoders, find_lpips
from tasks.errors import ConfigError
from tests.support.config import make_config
from tests.support.tiny import draw_photo

CPU = torch.device("cpu")


def as_pickle(tmp_path: Path) -> Path:
    """Copy the mini DINO the way the paper's encoder is published: one pickle of weights."""
    folder = shutil.copytree(MINI_FOLDER / "dino", tmp_path / "dino")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_pickled_encoder_gives_the_same_embeddings(tmp_path: Path) -> None:
    plain = Encoders(make_config(EncoderConfig, clip="mini", dino="mini", dino_resize=None), CPU)
    pickled = Encoders(make_config(EncoderConfig, clip="mini", dino=str(as_pickle(tmp_path)), dino_resize=None), CPU)
    photos = [draw_photo(0), draw_photo(1)]
    assert torch.equal(plain.encode_dino(photos), pickled.encode_dino(photos))


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "canary"),)

    folder = as_pickle(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Canary()}, protocol=2))
    with pytest.raises((pickle.UnpicklingError, OSError, RuntimeError)):
        Encoders(make_config(EncoderConfig, clip="mini", dino=str(folder)), CPU)
    assert not (tmp_path / "canary").exists()


def test_a_missing_encoder_raises_an_error_with_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds none of model.safetensors, .*see evaluation.encoders"):
        find_encoders(make_config(EncoderConfig, clip=str(tmp_path / "empty"), dino="mini"))
    with pytest.raises(ConfigError, match="no encoder at nobody/nothing"):
        find_encoders(make_config(EncoderConfig, clip="mini", dino="nobody/nothing"))


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "clip-vit-base-patch32": ("CLIP", {
        **CLIP, "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 224,
    }),
    "clip, newer": ("CLIP", {
        **CLIP, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_normalize": True,
        "do_rescale": True, "image_processor_type": "CLIPImageProcessor", "resample": 3,
        "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 224},
    }),
    "dino-vits16": ("ViT", {
        **IMAGENET, "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor",
        "resample": 2, "size": 224,
    }),
    "not rescaled": ("ViT", {
        **IMAGENET, "do_rescale": False, "image_processor_type": "ViTImageProcessor", "resample": 0,
        "size": {"height": 100, "width": 60},
    }),
}  # fmt: skip


@pytest.mark.parametrize("size", [(320, 240), (200, 501), (224, 224), (90, 64)])
@pytest.mark.parametrize("name", CONFIGS)
def test_preprocessing_matches_the_transformers_image_processor(
    tmp_path: Path, name: str, size: tuple[int, int]
) -> None:
    kind, config = CONFIGS[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    processor = {"CLIP": CLIPImageProcessorPil, "ViT": ViTImageProcessorPil}[kind].from_pretrained(tmp_path)
    photo = draw_photo(0).resize(size)
    theirs = processor(photo, return_tensors="pt").pixel_values[0]
    # The same pixels; a factor and two float32 operations apart.
    torch.testing.assert_close(Preprocessor(tmp_path)(photo), theirs, rtol=1e-5, atol=1e-5)


def test_dino_preprocessing_follows_the_paper_unless_dino_resize_is_unset(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CONFIGS["dino-vits16"][1]))
    photo = draw_photo(0).resize((400, 300))
    found = Preprocessor(tmp_path, resize=256)(photo)
    scaled = photo.resize((341, 256), Image.Resampling.BICUBIC)
    cropped = torch.from_numpy(np.array(scaled.crop((58, 16, 282, 240)))).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(IMAGENET[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    torch.testing.assert_close(found, (cropped - mean) / std, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, Preprocessor(tmp_path)(photo), atol=0.1)


def test_missing_lpips_weights_skip_the_metric_or_raise_if_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert find_lpips(make_config(EncoderConfig, clip="mini", dino="mini")) is None
    with pytest.raises(ConfigError, match=r"evaluation.encoders.lpips needs .*alex.pth"):
        find_lpips(make_config(EncoderConfig, clip="mini", dino="mini", lpips=str(tmp_path / "alex.pth")))


def test_an_encoder_folder_that_refers_to_another_model_is_rejected(tmp_path: Path) -> None:
    folder = shutil.copytree(MINI_FOLDER / "clip", tmp_path / "clip")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(ConfigError, match=r"holds adapter_config.json, an adapter of another model"):
        Encoders(make_config(EncoderConfig, clip=str(folder), dino="mini"), CPU)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config.json"):
        Encoders(make_config(EncoderConfig, clip=str(folder), dino="mini"), CPU)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 10**6), ("size", {"shortest_edge": 60_000}), ("size", {"shortest_edge": -1}), ("size", "x"),
        ("size", {"height": 224}), ("size", {}), ("size", True), ("size", None),
        ("crop_size", {"height": 1, "width": 10**9}),
        ("crop_size", 0), ("crop_size", {"shortest_edge": 5}), ("patch_size", 10**6), ("image_mean", None),
        ("image_mean", [0.5]), ("image_std", [1, 1, 0]), ("image_std", [1, 1, 1e999]), ("rescale_factor", "x"),
        ("resample", 17),
    ],
)  # fmt: skip
def test_out_of_range_preprocessor_values_are_rejected_before_resizing(
    tmp_path: Path, name: str, value: object
) -> None:
    settings = {**CONFIGS["clip, newer"][1], name: value}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=rf"preprocessor_config.json: {name} is no"):
        Preprocessor(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", None])
def test_a_damaged_preprocessor_config_raises_an_error_naming_it(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"preprocessor_config.json .*see evaluation.encoders"):
        Preprocessor(tmp_path)
