"""Drawing single pictures: with the weights of another step, and with no more imported than that takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flows.cli.results.generate import (
    ImageRequest,
    Target,
    change_diffusion,
    check_request,
    draw_grid,
    fetch_weights,
    read_prompts,
)
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.hub import MINI_FOLDER
from tasks.errors import ConfigError
from tasks.manifests.base import ModelRef
from tasks.manifests.training import TunedModel
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.config import make_config


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


def test_prompts_of_a_file_leave_out_comments_and_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# scenes\na fish at sea\n\n  a fish at night \n")
    assert read_prompts(path) == ("a fish at sea", "a fish at night")


@pytest.mark.parametrize(
    ("data", "told"),
    [(b"", "0 prompts"), (b"#\n", "0 prompts"), (b"\xff", "cannot be read"), (b"a\x1b[31m", "prompt 1 has control")],
)
def test_a_file_without_usable_prompts_is_a_one_line_error(tmp_path: Path, data: bytes, told: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=told):
        read_prompts(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (ImageRequest(("a nude boy",)), "the prompt is refused"),
        (ImageRequest(("fish", "a nude boy")), "the prompt is refused"),
        (ImageRequest(("fish",), size=100), "not a multiple of 8; use 96"),
        (ImageRequest(("fish",) * 11, num=100), "1,100 images, at most 1,000"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_refused_before_a_model_is_loaded(request_: ImageRequest, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_request(request_)


def test_size_and_sampler_change_the_models_configuration() -> None:
    config = make_config(DiffusionConfig, pretrained_model_name_or_path="mini", resolution=64)
    changed = change_diffusion(config, ImageRequest(("x",), size=96, sampler="euler"))
    assert (changed.resolution, changed.sampler) == (96, "euler")
    assert change_diffusion(config, ImageRequest(("x",))) == config
    with pytest.raises(ConfigError, match="--sampler: no scheduler of that name"):
        change_diffusion(config, ImageRequest(("x",), sampler="none"))


def test_several_images_have_files_of_their_own_and_one_keeps_the_name_that_was_asked_for() -> None:
    target = Target(Path("run"), Path("out/a.png"))
    assert target.name(7, 0, num=1) == Path("out/a.png")
    assert [target.name(7, n, num=2) for n in (0, 1)] == [Path("out/a-000.png"), Path("out/a-001.png")]
    assert Target(Path("run")).name(7, 1, num=2) == Path("run/image-7-001.png")
    assert len({target.grid(), *(target.name(7, n, num=3) for n in range(3))}) == 4


def test_a_grid_has_one_row_per_prompt() -> None:
    pictures = [Image.new("RGB", (64, 64), (10 * n, 0, 0)) for n in range(6)]
    grid = draw_grid(pictures, columns=3)
    assert grid.size == (192, 128)
    assert [grid.getpixel((32 + 64 * (n % 3), 32 + 64 * (n // 3))) for n in range(6)] == [
        (10 * n, 0, 0) for n in range(6)
    ]
    assert draw_grid(pictures[:5], columns=1).size == (192, 128)


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
