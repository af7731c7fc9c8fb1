"""The shipped weights: whole, small, and doing what their card says."""

import json
import re

from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, ViTModel

from tasks.diffusion.hub import MINI_FOLDER
from tasks.mini.pretrain.tokens import RARE_TOKENS
from tasks.mini.pretrain.verify import TARGETS, check_digests, measure_encoders, measure_generation


def test_every_file_matches_its_digest() -> None:
    check_digests(MINI_FOLDER)
    named = set(json.loads((MINI_FOLDER / "digests.json").read_text()))
    there = {str(p.relative_to(MINI_FOLDER)) for p in MINI_FOLDER.rglob("*") if p.is_file()}
    assert there - named == {"digests.json", "README.md"}


def test_weights_are_small_safetensors() -> None:
    weights = list(MINI_FOLDER.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) <= 24_000_000
    assert not [p for p in MINI_FOLDER.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_weights_load_in_diffusers_and_transformers() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(MINI_FOLDER / "base", safety_checker=None)
    assert pipeline.vae.config.latent_channels == 4
    tokens = pipeline.tokenizer(list(RARE_TOKENS)).input_ids
    assert all(len(ids) == 3 for ids in tokens)
    assert len({tuple(ids) for ids in tokens}) == len(RARE_TOKENS)
    CLIPModel.from_pretrained(MINI_FOLDER / "clip")
    ViTModel.from_pretrained(MINI_FOLDER / "dino", add_pooling_layer=False)


def read_card() -> dict[str, float]:
    rows = re.findall(
        r"^\| ([a-zA-Z -]+(?: \(dB\))?) \| ([0-9.]+) \|", (MINI_FOLDER / "README.md").read_text(), re.MULTILINE
    )
    return {name: float(value) for name, value in rows}


def test_the_model_card_metrics_hold_on_a_small_sample() -> None:
    card = read_card()
    assert set(TARGETS) <= set(card)
    # Fewer prompts than the card's own measurement, so some slack for chance.
    figures = {**measure_generation(24), **measure_encoders(80)}
    for name in TARGETS:
        slack = 0.4 if "psnr" in name else 0.12
        assert figures[name] >= card[name] - slack, f"{name}: {figures[name]:.3f}, the card says {card[name]}"
