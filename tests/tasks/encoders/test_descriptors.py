"""Encoders are found before anything is computed, and read without running anything they hold."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.diffusion.base import MINI_FOLDER
from tasks.encoders.config import EncoderConfig
from tasks.encoders.descriptors import Encoders
from tasks.encoders.folders import find_encoders
from tasks.errors import ConfigError
from tests.tiny import draw_photo

CPU = torch.device("cpu")


def as_pickle(tmp_path: Path) -> Path:
    """Copy the mini DINO the way the paper's encoder is published: one pickle of weights."""
    folder = shutil.copytree(MINI_FOLDER / "dino", tmp_path / "dino")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_an_encoder_published_as_a_pickle_gives_the_same_descriptors(tmp_path: Path) -> None:
    plain = Encoders(EncoderConfig(clip="mini", dino="mini"), CPU)
    pickled = Encoders(EncoderConfig(clip="mini", dino=str(as_pickle(tmp_path))), CPU)
    photos = [draw_photo(0), draw_photo(1)]
    assert torch.equal(plain.encode_dino(photos), pickled.encode_dino(photos))


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "canary"),)

    folder = as_pickle(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Canary()}, protocol=2))
    with pytest.raises((pickle.UnpicklingError, OSError, RuntimeError)):
        Encoders(EncoderConfig(clip="mini", dino=str(folder)), CPU)
    assert not (tmp_path / "canary").exists()


def test_a_missing_encoder_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds none of model.safetensors, .*see evaluation.encoders"):
        find_encoders(EncoderConfig(clip=str(tmp_path / "empty"), dino="mini"))
    with pytest.raises(ConfigError, match="no encoder at nobody/nothing"):
        find_encoders(EncoderConfig(clip="mini", dino="nobody/nothing"))
