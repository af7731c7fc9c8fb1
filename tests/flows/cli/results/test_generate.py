"""Drawing single pictures: with the weights of another step, and with no more imported than that takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli.results.generate import fetch_weights
from tasks.diffusion.hub import MINI_FOLDER
from tasks.errors import ConfigError
from tasks.manifests.base import ModelRef
from tasks.manifests.training import TunedModel
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder


def test_a_retained_checkpoint_is_fetched_and_an_unknown_step_raises(tmp_path: Path, store: LocalStore) -> None:
    folder = StageFolder(store, "training", "k")
    model = folder.put("model/weights.safetensors", b"published")
    folder.put("candidates/step-00000400/unet/weights.safetensors", b"kept")
    folder.finish(
        TunedModel(
            **folder.head(2, counts={}),
            base_model=ModelRef(location="x", revision=None, sha256="0"),
            model=(model,),
            family="stable_diffusion",
            method="full",
            num_steps=800,
            published_step=600,
            trainable_parameters=1,
            total_parameters=1,
            final_loss=0.0,
            peak_memory_bytes=1,
            subject_sha256="s",
            prior_sha256="p",
        )
    )
    weights = fetch_weights(store, "r", "k", candidate=400, work=tmp_path)
    assert (weights / "unet" / "weights.safetensors").read_bytes() == b"kept"
    with pytest.raises(ConfigError, match=r"no weights of step 300 besides the published ones \(retained: 400\)"):
        fetch_weights(store, "r", "k", candidate=300, work=tmp_path)


DRAW = """
import contextlib, hashlib, json, sys
from pathlib import Path
from flows.cli.results.generate import fast_imports
from tasks.diffusion.types import SamplingRequest
from tasks.diffusion.registry import load_model
from conf.defaults import read_defaults
from tasks.diffusion.config import DiffusionConfig

values = {**read_defaults()["diffusion"], "pretrained_model_name_or_path": "mini", "resolution": 64}
CONFIG = DiffusionConfig(**values)
with fast_imports(Path(sys.argv[2])) if sys.argv[1] == "fast" else contextlib.nullcontext():
    model = load_model(CONFIG, folder=Path(sys.argv[2]))
picture = model.sample([SamplingRequest(prompt="a photo of a fish", seed=1)], num_inference_steps=2, guidance_scale=3.0)
names = {name for name, module in sys.modules.items() if module is not None}
print(json.dumps({
    "picture": hashlib.sha256(picture[0].tobytes()).hexdigest(),
    "imported": sorted(names & {"bitsandbytes", "peft", "scipy.stats", "prefect", "mlflow", "openai", "hydra"}),
}))
"""


def draw(way: str, folder: Path) -> dict[str, object]:
    words = [sys.executable, "-c", DRAW, way, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_fast_imports_skip_modules_without_changing_the_image() -> None:
    fast, plain = draw("fast", MINI_FOLDER / "base"), draw("plain", MINI_FOLDER / "base")
    assert fast["picture"] == plain["picture"]
    assert fast["imported"] == []


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, ["peft", "scipy"]),
        ({"model_index.json": "{}", "scheduler/scheduler_config.json": '{"use_beta_sigmas": true}'}, ["scipy"]),
        ({"model_index.json": "{}", "scheduler/scheduler_config.json": '{"use_beta_sigmas": false}'}, []),
    ],
)
def test_fast_imports_keep_what_adapters_and_beta_sigmas_need(
    tmp_path: Path, files: dict[str, str], wanted: list[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code = f"""
import importlib.util
from pathlib import Path
from flows.cli.results.generate import fast_imports
with fast_imports(Path({str(tmp_path)!r})):
    print([name for name in ("peft", "scipy") if importlib.util.find_spec(name)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(wanted)
