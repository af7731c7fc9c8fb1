"""A safety checker of the true architecture with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig

from tasks.encoders.safety import SafetyChecker, find_safety_checker
from tests.support.tiny import tiny_diffusion_config

CPU = torch.device("cpu")
NEVER, ALWAYS = 2.0, -2.0
"""Thresholds of the cosine to a concept."""
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "projection_dim": 24,
}  # fmt: skip
PREPROCESSOR = {
    "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 32,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.26, 0.27],
}  # fmt: skip


def add_safety_checker(folder: Path) -> Path:
    """Add one that refuses nothing yet to a Stable Diffusion folder, and return the folder."""
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=24))
    checker.requires_grad_(False)
    checker.concept_embeds_weights.fill_(NEVER)
    checker.special_care_embeds_weights.fill_(NEVER)
    checker.save_pretrained(folder / "safety_checker")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def refuse(folder: Path, *, like: Any = None) -> None:
    """Let the checker of a model refuse every picture, or one picture alone."""
    path = folder / "safety_checker"
    checker = StableDiffusionSafetyChecker.from_pretrained(path).requires_grad_(False)
    if like is None:
        checker.concept_embeds_weights.fill_(ALWAYS)
    else:
        pixels = open_checker(folder).preprocess(like)[None]
        checker.concept_embeds[0] = checker.visual_projection(checker.vision_model(pixels)[1])[0]
        checker.concept_embeds_weights[0] = 0.999
    checker.save_pretrained(path)


def open_checker(folder: Path) -> SafetyChecker:
    files = find_safety_checker("auto", tiny_diffusion_config(folder))
    assert files is not None
    return SafetyChecker(files, CPU)
