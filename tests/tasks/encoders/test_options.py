"""Options of the encoders: without its option a test here fails."""

import json
from pathlib import Path

import pytest
import torch

from tasks.encoders.config import EncoderConfig
from tasks.encoders.embeddings import Encoders
from tasks.encoders.folders import find_encoders
from tests.support.config import make_config
from tests.support.tiny import draw_photo


def test_encoders_are_loaded_at_their_pinned_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, commit in (("a--clip", "a" * 40), ("a--dino", "b" * 40)):
        folder = tmp_path / f"models--{name}" / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": {"a--clip": "clip", "a--dino": "dinov2"}[name]}))
        (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
        (folder / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    revisions = {"clip_revision": "a" * 40, "dino_revision": "b" * 40}
    clip, dino = find_encoders(make_config(EncoderConfig, clip="a/clip", dino="a/dino", **revisions))
    assert (clip.name, dino.name) == ("a" * 40, "b" * 40)


def test_dino_resize_changes_the_dino_embeddings() -> None:
    photo = [draw_photo(size=128)]
    plain, resized = (
        Encoders(make_config(EncoderConfig, clip="mini", dino="mini", dino_resize=size), torch.device("cpu"))
        for size in (None, 96)
    )
    assert not torch.allclose(plain.encode_dino(photo), resized.encode_dino(photo))
