"""Generating with models from elsewhere: found, given their base, and refused by name where they do not load."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flows.cli.results.images.contact_sheet import Sheet, draw_contact_sheet
from flows.cli.results.images.files import Target
from flows.cli.results.images.generate import GeneratedImages, generate, print_images
from flows.cli.results.images.models import ModelChoice, find_base, find_resolution, open_source, read_locations
from flows.cli.results.images.request import GUIDANCE, ImageRequest, check_request, read_steps, read_values
from tasks.diffusion.external.detection import detect
from tasks.diffusion.lora.adapters import save_lora
from tasks.diffusion.registry import load_model
from tasks.diffusion.types import LORA_FILE
from tasks.encoders.safety import SafetyChecker
from tasks.errors import ConfigError
from tasks.images import decode_png, read_mark
from tests.support.tiny import SIDE, tiny_diffusion_config
from tests.support.tiny_lora import EXPORT, adapt
from tests.support.tiny_safety import add_safety_checker, refuse

PROMPT = "a photo of sks fish"


def draw(choice: ModelChoice, folder: Path, **settings: Any) -> bytes:
    """Generate one image with a model from elsewhere and return its pixels."""
    request = ImageRequest((PROMPT,), seed=3, num_inference_steps=2, **settings)
    with open_source(folder, choice) as source:
        assert source.folder == Path.cwd()
        done = generate(source, request, Target(folder), on_progress=lambda done, total: None)
    [(path, _)] = done.images
    return decode_png(path.read_bytes()).tobytes()


@pytest.fixture
def lora(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A LoRA of the tiny model, as our own training writes it."""
    model = load_model(tiny_diffusion_config(tiny_model_folder))
    names = adapt(model)
    save_lora(model, tmp_path / "lora", names, export=EXPORT)
    return tmp_path / "lora" / LORA_FILE


def test_a_diffusers_folder_generates_at_its_own_size(tiny_model_folder: Path, tmp_path: Path) -> None:
    assert find_resolution(tiny_model_folder) == SIDE
    found = draw(ModelChoice(str(tiny_model_folder)), tmp_path)
    assert len(found) == SIDE * SIDE * 3
    again = draw(ModelChoice(str(tiny_model_folder)), tmp_path, guidance_scale=2.0)
    assert again != found
    negative = draw(ModelChoice(str(tiny_model_folder)), tmp_path, negative_prompt="snow on the beach")
    assert negative != found


def test_a_lora_changes_the_images_of_the_base_that_is_named_by_its_strength(
    lora: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    base = str(tiny_model_folder)
    plain = draw(ModelChoice(base), tmp_path)
    assert draw(ModelChoice(str(lora), base=base), tmp_path) != plain
    assert draw(ModelChoice(str(lora), base=base), tmp_path, lora_scale=0.0) == plain
    assert draw(ModelChoice(str(lora.parent), base=base), tmp_path) == draw(ModelChoice(str(lora), base=base), tmp_path)


def test_a_lora_of_another_model_is_refused_by_name(lora: Path, tmp_path: Path) -> None:
    # Without `--base` the default base model counts, whose layers are wider than the tiny model's.
    with pytest.raises(ConfigError, match=r"pytorch_lora_weights.safetensors.* doesn't fit the base model") as caught:
        draw(ModelChoice(str(lora)), tmp_path)
    assert "\n" not in str(caught.value)


def test_an_embedding_is_named_by_its_token(tiny_model_folder: Path, tmp_path: Path) -> None:
    path, base = tmp_path / "embedding.safetensors", str(tiny_model_folder)
    save_file({"emb_params": 5 * torch.ones(1, 16)}, path)
    plain = draw(ModelChoice(base), tmp_path)
    assert draw(ModelChoice(str(path), base=base), tmp_path) != plain
    assert draw(ModelChoice(str(path), base=base, token="snow"), tmp_path) == plain  # the prompt does not name it


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.ckpt", "is a pickle, which can run code"),
        ("nowhere", "no run 'nowhere'"),
        ("nowhere.safetensors", "there is no model at nowhere.safetensors"),
        ("a/b", "there is no model at a/b"),
        ("empty", "holds neither model_index.json nor a file in safetensors"),
        ("odd", "is a 'OddPipeline', not one of StableDiffusionPipeline"),
        ("broken", "can't be read"),
    ],
)
def test_what_is_no_model_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.ckpt").touch()
    for folder, index in (("odd", '{"_class_name": "OddPipeline"}'), ("broken", "{"), ("empty", "")):
        Path(folder).mkdir()
        if index:
            Path(folder, "model_index.json").write_text(index)
    with pytest.raises(ConfigError, match=reason) as caught, open_source(tmp_path, ModelChoice(name)):
        pass
    assert "\n" not in str(caught.value)


def test_a_checkpoint_and_an_unknown_base_are_refused(tiny_model_folder: Path, tmp_path: Path, lora: Path) -> None:
    with (
        pytest.raises(ConfigError, match="--candidate takes a run"),
        open_source(tmp_path, ModelChoice(str(tiny_model_folder)), candidate=3),
    ):
        pass
    with pytest.raises(ConfigError, match="--base 'sd9' is no diffusers folder and none of flux-dev, mini"):
        draw(ModelChoice(str(lora), base="sd9"), tmp_path)


def test_an_exported_folder_names_its_base_among_the_known_ones_alone(lora: Path) -> None:
    assert find_base(detect(str(lora))) == "mini"
    lineage = lora.with_name("lineage.json")
    known = read_locations()
    lineage.write_text(json.dumps({"base_model": {"location": known["sdxl"]}}))
    assert find_base(detect(str(lora))) == "sdxl"
    for content in ({"base_model": {"location": "evil/repository"}}, {"base_model": 3}, {}):
        lineage.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=re.escape(f"{lineage} names the base model")):
            find_base(detect(str(lora)))


def test_a_settings_grid_is_one_labelled_sheet_of_one_seed(tiny_model_folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    request = ImageRequest((PROMPT,), seed=3, grid_guidance=(1.5, 9.0), grid_steps=(1, 2, 3))
    with open_source(tmp_path, ModelChoice(str(tiny_model_folder))) as source:
        done = generate(source, request, Target(tmp_path), on_progress=lambda *now: seen.append(now))
        [(single, _)] = generate(
            source, replace(request, grid_guidance=(), grid_steps=(), guidance_scale=9.0, num_inference_steps=3),
            Target(tmp_path), on_progress=lambda *now: None,
        ).images  # fmt: skip
    assert (done.images, done.grid) == ((), tmp_path / "grid-3.png")
    assert seen == [(number, 6) for number in range(7)]
    sheet = decode_png(done.grid.read_bytes())
    picture = decode_png(single.read_bytes()).resize((128, 128), 0)
    assert picture.tobytes() in {
        sheet.crop((x, y, x + 128, y + 128)).tobytes() for x in range(sheet.width - 140, sheet.width - 127)
        for y in range(sheet.height - 140, sheet.height - 127)
    }  # fmt: skip
    cells = read_mark(done.grid.read_bytes())["Description"]
    assert json.loads(cells)["grid_guidance"] == [1.5, 9.0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("3,x", "is no list of numbers"),
        ("", "is no list of numbers"),
        ("3,31", "31 is out of bounds; it must be 1 to 30"),
        ("nan", "out of bounds"),
        ("3,3.0", "names a value twice"),
    ],
)
def test_bad_values_of_a_settings_grid_are_one_line(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        read_values(text, "--grid-guidance", GUIDANCE)
    assert str(caught.value).startswith("--grid-guidance")
    assert "\n" not in str(caught.value)


def test_steps_of_a_settings_grid_are_whole_and_few() -> None:
    assert read_steps("20,50", "--grid-steps") == (20, 50)
    with pytest.raises(ConfigError, match="steps are whole numbers"):
        read_steps("2.5", "--grid-steps")
    many = ImageRequest((PROMPT,), grid_guidance=tuple(map(float, range(1, 12))), grid_steps=tuple(range(1, 11)))
    for request, reason in (
        (many, "the grid has 110 images, at most 100"),
        (ImageRequest((PROMPT, PROMPT), grid_steps=(2,)), "draw one prompt and seed"),
        (ImageRequest((PROMPT,), num=2, grid_steps=(2,)), "draw one prompt and seed"),
        (ImageRequest((PROMPT,), guidance_scale=3.0, grid_guidance=(2.0,)), "--guidance or --grid-guidance"),
        (ImageRequest((PROMPT,), num_inference_steps=3, grid_steps=(2,)), "--steps or --grid-steps"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_request(request)


def test_labels_of_a_contact_sheet_are_wrapped_and_a_missing_cell_is_grey() -> None:
    sheet = draw_contact_sheet(Sheet(["x" * 200], ["one two three " * 5, "y" * 2000], [[None], [None]]))
    assert sheet.getpixel((sheet.width - 20, sheet.height - 60)) == (221, 221, 221)
    assert sheet.width < 400
    assert sheet.height < 500


def test_images_that_the_safety_checker_refuses_are_not_written(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_safety_checker(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    request = ImageRequest((PROMPT,), num=3, seed=3, num_inference_steps=2)

    def run(name: str, **changes: Any) -> GeneratedImages:
        (tmp_path / name).mkdir()
        target = Target(tmp_path / name, has_grid=not changes.get("grid_steps"))
        with open_source(tmp_path, ModelChoice(str(model))) as source:
            return generate(source, replace(request, **changes), target, on_progress=lambda *now: None)

    every = run("every")
    refuse(model, like=decode_png(every.images[1][0].read_bytes()))
    done = run("checked")
    assert ([seed for _, seed in done.images], done.refused) == ([3, 5], ("seed 4",))
    assert sorted(path.name for path in (tmp_path / "checked").glob("image*")) == ["image-3-000.png", "image-5-002.png"]
    assert done.grid is not None
    grid = decode_png(done.grid.read_bytes())
    assert grid.getpixel((SIDE + SIDE // 2, SIDE // 2)) == (0xDD, 0xDD, 0xDD)  # two columns of three images
    print_images(done)
    assert "refused by the safety checker and not written: seed 4" in capsys.readouterr().err
    assert run("unchecked", is_checked=False).refused == ()
    found = iter((False, True))
    with monkeypatch.context() as patch:  # the random network finds both cells alike
        patch.setattr(SafetyChecker, "find_unsafe", lambda self, pictures: [next(found)])
        sheet = run("cells", num=1, num_inference_steps=None, grid_steps=(1, 2))
    assert [text.endswith(", 2 steps") for text in sheet.refused] == [True]
    two = run("two", prompts=("a photo of a mug", PROMPT))
    assert "prompt 2, seed 4" in two.refused
    refuse(model)
    for name, changes in {"all": {}, "sheet": {"num": 1, "num_inference_steps": None, "grid_steps": (1, 2)}}.items():
        with pytest.raises(ConfigError, match=r"the safety checker refused all \d images; .*--no-safety-checker"):
            run(name, **changes)
        assert list((tmp_path / name).iterdir()) == []
    with (
        pytest.raises(ConfigError, match="--safety-checker: the base model has none"),
        open_source(tmp_path, ModelChoice(str(tiny_model_folder))) as source,
    ):
        generate(source, replace(request, is_checked=True), Target(tmp_path), on_progress=lambda *now: None)
    (model / "safety_checker" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks safety_checker/model.safetensors; .*--no-safety-checker"):
        run("missing")
