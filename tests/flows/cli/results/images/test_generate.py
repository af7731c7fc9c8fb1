"""Drawing single pictures: with the weights of another step, and with no more imported than that takes."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from flows.cli.main import main
from flows.cli.results.images.contact_sheet import draw_grid
from flows.cli.results.images.files import Target
from flows.cli.results.images.models import fetch_weights
from flows.cli.results.images.request import ImageRequest, change_diffusion, check_request, read_prompts
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.hub import MINI_FOLDER
from tasks.errors import ConfigError
from tasks.images import read_mark
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
    # What training chose, where another checkpoint was picked to be published.
    chosen = fetch_weights(store, "r", "k", candidate=600, work=tmp_path)
    assert (chosen / "weights.safetensors").read_bytes() == b"published"
    with pytest.raises(ConfigError, match=r"no checkpoint of step 300 besides the published one \(retained: 400\)"):
        fetch_weights(store, "r", "k", candidate=300, work=tmp_path)


def test_prompts_of_a_file_leave_out_comments_and_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# scenes\na fish at sea\n\n  a fish at night \n")
    assert read_prompts(path) == ("a fish at sea", "a fish at night")
    path.write_bytes(b"\xef\xbb\xbfa fish\xe2\x80\xa8at sea\r\n# none\n")
    assert read_prompts(path) == ("a fish\u2028at sea",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "0 prompts"), (b"#\n", "0 prompts"), (b"\xff", "cannot be read"), (b"a\x1b[31m", "prompt 1 has control")],
)
def test_a_file_without_usable_prompts_is_a_one_line_error(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=reason):
        read_prompts(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (ImageRequest(("a nude boy",)), "the prompt is refused"),
        (ImageRequest(("fish", "a nude boy")), "the prompt is refused"),
        (ImageRequest(("fish",), size=100), "not a multiple of 8; use 96"),
        (ImageRequest(("fish",) * 11, num=100), "1,100 images, at most 1,000"),
        (ImageRequest(("fish", "a nude boy")), "--prompts-file: prompt 2: the prompt is refused"),
        (ImageRequest(("a woman",), negative_prompt="clothes"), "the prompt is refused"),
        (ImageRequest(("fish\udcff",)), "the prompt has control characters or invalid UTF-8"),
        (ImageRequest(("fish\x1b[31m",)), "the prompt has control characters"),
        (ImageRequest(("fish",), negative_prompt="\0"), "--negative has control characters"),
        (ImageRequest(("f" * 2001,)), "the prompt has 2,001 characters, at most 2,000"),
        (ImageRequest(("fish",), seed=2**63 - 2, num=3), "--seed 9223372036854775806: at most 9223372036854775805"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_refused_before_a_model_is_loaded(
    request_: ImageRequest, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_request(request_)
    check_request(ImageRequest(("a naked sks",), seed=2**63 - 2, num=2), subject=("sks", "mole rat"))


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


@pytest.mark.parametrize("out", [".", "/", "adir", "image.jpg", "image", "taken.png", "photo.png", "file/image.png"])
def test_an_output_file_that_is_no_generated_image_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adir").mkdir()
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "file").write_text("x")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    with pytest.raises(ConfigError, match=r"^--out"):
        Target(tmp_path, Path(out)).check(num=1)


def test_a_generated_image_is_replaced_and_an_object_of_the_store_is_not(tmp_path: Path) -> None:
    path, picture = tmp_path / "image.PNG", Image.new("RGB", (8, 8))
    target = Target(tmp_path, path, has_grid=True)
    target.check(num=1)
    for title in ("a", "b"):
        assert target.write(path, picture, facts={"Title": title}) == path
        target.check(num=1)
        assert read_mark(path.read_bytes())["Title"] == title
    path.chmod(0o444)
    with pytest.raises(ConfigError, match="is no generated image"):
        target.check(num=1)
    (tmp_path / "image-grid.png").write_text("notes")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"image-grid.png exists"):
        target.check(num=1)


def test_a_default_name_of_another_image_is_numbered(tmp_path: Path) -> None:
    target, picture = Target(tmp_path), Image.new("RGB", (8, 8))
    path = target.name(7, 0, num=1)
    names = [target.write(path, picture, facts={"Title": title}).name for title in ("a", "b", "a", "c", "b")]
    assert names == ["image-7.png", "image-7-2.png", "image-7.png", "image-7-3.png", "image-7-2.png"]
    (tmp_path / "grid.png").write_text("mine")
    assert target.write(target.grid(), picture, facts={"Title": "a"}).name == "grid-2.png"
    assert (tmp_path / "grid.png").read_text() == "mine"


def test_an_image_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, picture = Target(tmp_path, tmp_path / "a.png"), Image.new("RGB", (8, 8))
    target.write(tmp_path / "a.png", picture, facts={})
    before = (tmp_path / "a.png").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(5, "disk error")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(ConfigError, match="disk error; set --out"):
        target.write(tmp_path / "a.png", picture, facts={"Title": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


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
from flows.cli.results.images.models import fast_imports
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
from flows.cli.results.images.models import fast_imports
with fast_imports(Path({str(tmp_path)!r})):
    print([name for name in ("peft", "scipy") if importlib.util.find_spec(name)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(wanted)


BASE = str(MINI_FOLDER / "base")


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the program that opens images notes what it was given."""
    folder, log = tmp_path / "bin", tmp_path / "opened"
    folder.mkdir()
    (folder / "xdg-open").write_text(f'#!/bin/sh\necho "$1" >> "{log}"\n')
    (folder / "xdg-open").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text().endswith("\n")):  # the opener is not waited for
        assert time.monotonic() < deadline, f"nothing was written to {path.name}"
        time.sleep(0.05)
    return path.read_text()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # click doesn't wait for the opener
@pytest.mark.parametrize(("words", "name"), [((), "a.png"), (("--num", "2", "--grid"), "a-grid.png")])
def test_open_shows_the_image_or_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Path, words: tuple[str, ...], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["generate", BASE, "a photo of a fish", "--steps", "1", "--seed", "3", "--out", "a.png", *words]
    assert main(command) == 0
    assert not opened.exists()
    assert main([*command, "--open"]) == 0
    assert wait_for(opened) == f"{name}\n"


def test_an_image_that_nothing_opens_is_written_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["generate", BASE, "a photo of a fish", "--steps", "1", "--out", "a.png", "--open"]) == 0
    assert "warning: no program to open images is installed (xdg-open)" in capsys.readouterr().err
    assert (tmp_path / "a.png").exists()


def test_a_single_picture_shows_its_steps_and_several_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["generate", BASE, "a photo of a fish", "--steps", "3", "--seed", "3"]
    assert main([*command, "--out", "one.png"]) == 0
    assert capsys.readouterr().err.splitlines() == ["steps: 1/3", "steps: 3/3"]
    assert main([*command, "--out", "two.png", "--num", "2"]) == 0
    assert capsys.readouterr().err.splitlines() == ["images: 0/2", "images: 1/2", "images: 2/2"]
    shown, plain = (Image.open(tmp_path / name).tobytes() for name in ("one.png", "two-000.png"))
    assert shown == plain


REFUSED = "a nude boy"


def refuse(words: Sequence[str] = ()) -> None:
    assert main(["generate", BASE, REFUSED, *words]) == 2


def test_a_refused_prompt_is_logged_by_rule_and_digest_without_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIKENESS_REFUSAL_LOG", raising=False)
    refuse()
    refuse(["--output-dir", "out"])
    assert capsys.readouterr().err.count("ConfigError: the prompt is refused: a minor in a sexual context") == 2
    for folder in ("runs", "out"):
        text = (tmp_path / folder / "refused-prompts.jsonl").read_text()
        [row] = map(json.loads, text.splitlines())
        assert row.keys() == {"time", "rule", "prompt_sha256", "model"}
        assert row["rule"] == "a minor in a sexual context"
        assert row["prompt_sha256"] == hashlib.sha256(REFUSED.encode()).hexdigest()
        assert row["time"].endswith("Z")
        assert "nude" not in text
    (tmp_path / "prompts.txt").write_text(f"a fish\n{REFUSED}\n")
    assert main(["generate", BASE, "--prompts-file", "prompts.txt"]) == 2
    assert "prompt 2: the prompt is refused" in capsys.readouterr().err
    assert len((tmp_path / "runs" / "refused-prompts.jsonl").read_text().splitlines()) == 2


def test_the_log_of_refused_prompts_can_be_moved_and_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIKENESS_REFUSAL_LOG", str(tmp_path / "team" / "log.jsonl"))
    refuse()
    assert len((tmp_path / "team" / "log.jsonl").read_text().splitlines()) == 1
    monkeypatch.setenv("LIKENESS_REFUSAL_LOG", "off")
    refuse()
    assert [path.name for path in tmp_path.iterdir()] == ["team"]
    monkeypatch.setenv("LIKENESS_REFUSAL_LOG", str(tmp_path / "team" / "log.jsonl" / "no-folder"))
    refuse()  # as without a log
    assert "warning: the refusal was not logged" in capsys.readouterr().err
