"""Evaluate the shipped mini models on prompts, seeds and scenes that pretraining never used.

python -m tasks.mini.pretrain.verify --num-prompts 200 --write-card
"""

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.families.stable_diffusion import StableDiffusion
from tasks.diffusion.hub import MINI_FOLDER
from tasks.diffusion.types import SamplingRequest
from tasks.mini.pretrain import models
from tasks.mini.pretrain.dataset import HELD_OUT_SEED, label_of, scene_of
from tasks.mini.pretrain.export import CLASSIFIER_FILE
from tasks.mini.vision_server.vision import VisionModel
from tasks.mini.world.scenes import CLASS_NOUNS, COLORS, PLACE_PHRASES, PLACES, draw_scene
from tasks.stage.digests import digest_file

NUM_STEPS, GUIDANCE = 25, 3.0
TARGETS = {
    "right class": 0.95,
    "right color": 0.90,
    "right place": 0.95,
    "vae psnr (dB)": 26.0,
    "clip zero-shot class": 0.98,
}


@dataclass(frozen=True)
class Prompt:
    """A prompt and the labels that its samples should have."""

    text: str
    class_noun: str
    color: str
    place: str
    seed: int


def check_digests(folder: Path) -> None:
    """Raise ValueError if a shipped file differs from its digest in `digests.json`."""
    for name, expected in json.loads((folder / "digests.json").read_text()).items():
        if digest_file(folder / name) != expected:
            raise ValueError(f"{name} differs from its digest")


def load_base() -> StableDiffusion:
    """Return the shipped base model."""
    config = DiffusionConfig(
        family="stable_diffusion", pretrained_model_name_or_path="mini", revision=None, resolution=64,
        sampler="dpm++", precision="fp32", device="auto",
    )  # fmt: skip
    return StableDiffusion.load(MINI_FOLDER / "base", config)


def load_classifier() -> models.SceneClassifier:
    """Return the classifier in float32."""
    classifier = models.SceneClassifier()
    state = load_file(MINI_FOLDER / CLASSIFIER_FILE)  # float16 on disk
    classifier.load_state_dict({key: value.float() for key, value in state.items()})
    return classifier.eval()


def draw_prompts(num: int) -> list[Prompt]:
    """Return prompts with class nouns in turn, random colors and places, and held-out seeds."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    prompts = []
    for index in range(num):
        noun = CLASS_NOUNS[index % len(CLASS_NOUNS)]
        color, place = str(rng.choice(list(COLORS))), str(rng.choice(PLACES))
        text = f"a photo of a {color} {noun} {rng.choice(PLACE_PHRASES[place])}"
        prompts.append(Prompt(text.replace("a orange", "an orange"), noun, color, place, 50_000 + index))
    return prompts


def generate_images(model: StableDiffusion, prompts: list[Prompt]) -> list[Image.Image]:
    """Sample one picture per prompt, in batches of 20."""
    pictures = []
    for start in range(0, len(prompts), 20):
        requests = [SamplingRequest(p.text, p.seed) for p in prompts[start : start + 20]]
        pictures += model.sample(requests, num_inference_steps=NUM_STEPS, guidance_scale=GUIDANCE)
    return pictures


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """Return `(N, 3, 64, 64)` in [-1, 1]."""
    return models.to_pixel_values(torch.from_numpy(np.stack([np.asarray(p) for p in pictures])))


@torch.no_grad()
def measure_generation(num: int) -> dict[str, float]:
    """Return the fractions of samples that the classifier assigns the prompt's class, color and place."""
    prompts = draw_prompts(num)
    logits = load_classifier()(to_tensor(generate_images(load_base(), prompts)))
    right = {}
    for head, name in (("class_noun", "class"), ("color", "color"), ("place", "place")):
        wanted = torch.tensor([models.HEADS[head].index(getattr(p, head)) for p in prompts])
        right[f"right {name}"] = float((logits[head].argmax(1) == wanted).float().mean())
    return right


@torch.no_grad()
def measure_encoders(num: int) -> dict[str, float]:
    """Return figures on held-out scenes: VAE PSNR, CLIP zero-shot accuracy, and accuracy of the classifier itself."""
    scenes = [scene_of(HELD_OUT_SEED, index) for index in range(num)]
    pictures = [draw_scene(scene) for scene in scenes]
    labels = np.array([label_of(scene) for scene in scenes])
    pixels, vae, vision = to_tensor(pictures), load_base().vae, VisionModel()
    # Halved, so that values span [0, 1] and PSNR is -10 * log10(MSE).
    errors = [((vae(p[None]).sample.clamp(-1, 1) - p) / 2).pow(2).mean() for p in pixels[:200]]
    nouns = tuple(f"a photo of a {noun}" for noun in CLASS_NOUNS)
    chosen = np.array([int(vision.choose(picture, nouns).argmax()) for picture in pictures])
    logits = load_classifier()(pixels)
    figures = {
        "vae psnr (dB)": float((-10 * torch.stack(errors).log10()).mean()),
        "clip zero-shot class": float((chosen == labels[:, 0]).mean()),
    }
    for column, head in enumerate(models.HEADS):
        known = labels[:, column] >= 0  # marked objects have no color label
        predicted = logits[head].argmax(1).numpy()
        figures[f"examiner {head}"] = float((predicted[known] == labels[known, column]).mean())
    return figures


def write_card(figures: dict[str, float], *, num_prompts: int) -> None:
    """Replace the figures in the model card."""
    path = MINI_FOLDER / "README.md"
    start, end = "<!-- figures -->", "<!-- end of figures -->"
    rows = [f"| {name} | {value:.3f} | {TARGETS.get(name, '')} |" for name, value in figures.items()]
    table = "\n".join(["| figure | measured | target, at least |", "|---|---|---|", *rows])
    note = f"\n\n{num_prompts} prompts, {NUM_STEPS} steps, guidance {GUIDANCE}; torch {torch.__version__}, "
    note += f"{platform.machine()}, {time.strftime('%Y-%m-%d')}.\n"
    text = path.read_text()
    head, tail = text.split(start)[0], text.split(end)[1]
    path.write_text(f"{head}{start}\n{table}{note}{end}{tail}")


def draw_grid(path: Path, *, columns: int = 10, rows: int = 4, side: int = 96) -> None:
    """Write a grid of samples of the base model."""
    pictures = generate_images(load_base(), draw_prompts(columns * rows))
    grid = Image.new("RGB", (columns * side, rows * side))
    for index, picture in enumerate(pictures):
        place = (index % columns * side, index // columns * side)
        grid.paste(picture.resize((side, side), Image.Resampling.BICUBIC), place)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; exit with 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m tasks.mini.pretrain.verify", description=__doc__)
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--num-scenes", type=int, default=1000)
    parser.add_argument("--write-card", action="store_true", help="keep the figures in the model card")
    parser.add_argument("--grid", type=Path, help="also write a grid of pictures to this file")
    options = parser.parse_args(argv)
    check_digests(MINI_FOLDER)
    figures = {**measure_generation(options.num_prompts), **measure_encoders(options.num_scenes)}
    for name, value in figures.items():
        target = TARGETS.get(name)
        mark = "" if target is None else f"  target {target}  {'ok' if value >= target else 'BELOW TARGET'}"
        print(f"{name:22} {value:8.3f}{mark}")
    if options.write_card:
        write_card(figures, num_prompts=options.num_prompts)
    if options.grid:
        draw_grid(options.grid)
    return int(any(figures[name] < target for name, target in TARGETS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
