"""Export the pretrained parts to the folders that the pipeline loads, with digests."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel

from tasks.mini.pretrain import models
from tasks.mini.pretrain.train import Pretrainer
from tasks.stage.digests import digest_file

# Maps pixels to [-1, 1], as in pretraining.
PREPROCESSOR = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLASSIFIER_FILE = "classifier.safetensors"


def export_models(trainer: Pretrainer, out: Path) -> None:
    """Write base model, encoders and classifier in float16."""
    tokenizer, clip = trainer.tokenizer(), trainer.clip_vision()
    vae, unet = trainer.vae_decoder(), trainer.unet()
    _, scaling_factor = trainer.latents(vae)
    vae.register_to_config(scaling_factor=round(scaling_factor, 6))
    unet.set_default_attn_processor()  # pretraining on a CPU has replaced it
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())  # since transformers 5 both have the same keys
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=models.build_noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to("cpu", torch.float16).save_pretrained(out / "base", safe_serialization=True)
    clip.to("cpu", torch.float16).save_pretrained(out / "clip", safe_serialization=True)
    tokenizer.save_pretrained(out / "clip")
    trainer.dino().to("cpu", torch.float16).save_pretrained(out / "dino", safe_serialization=True)
    for name in ("clip", "dino"):
        (out / name / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
    state = trainer.classifier().to("cpu", torch.float16).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, out / CLASSIFIER_FILE)
    write_digests(out)


def write_digests(out: Path) -> None:
    """Write the SHA-256 of every exported file to `digests.json`, except of itself and the model card."""
    paths = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in ("digests.json", "README.md")]
    digests = {str(path.relative_to(out)): digest_file(path) for path in paths}
    (out / "digests.json").write_text(json.dumps(digests, indent=1) + "\n")
