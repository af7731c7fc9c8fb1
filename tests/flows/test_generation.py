"""Drawing with the weights of another step than the published one."""

from pathlib import Path

import pytest

from flows.generation import fetch_weights
from tasks.contract import StageFolder
from tasks.errors import ConfigError
from tasks.manifests import ModelRef, TunedModel
from tasks.services.store import LocalStore


def test_kept_weights_are_fetched_and_others_named(tmp_path: Path, store: LocalStore) -> None:
    folder = StageFolder(store, "training", "k")
    model = folder.put("model/weights.safetensors", b"published")
    folder.put("candidates/step-00000400/unet/weights.safetensors", b"kept")
    folder.finish(
        TunedModel, version=2, counts={}, base_model=ModelRef(location="x", revision=None, sha256="0"), model=(model,),
        family="stable_diffusion", method="full", num_steps=800, published_step=600, trainable_parameters=1,
        total_parameters=1, final_loss=0.0, peak_memory_bytes=1, subject_sha256="s", prior_sha256="p",
    )  # fmt: skip
    weights = fetch_weights(store, "r", "k", candidate=400, work=tmp_path)
    assert (weights / "unet" / "weights.safetensors").read_bytes() == b"kept"
    with pytest.raises(ConfigError, match=r"no weights of step 300 beside the published ones \(kept: 400\)"):
        fetch_weights(store, "r", "k", candidate=300, work=tmp_path)
