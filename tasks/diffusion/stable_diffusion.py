"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, noise or velocity prediction."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from tasks.diffusion.base import Posterior, SamplingRequest, choose_device
from tasks.diffusion.config import DiffusionConfig
from tasks.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLERS = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


def load(folder: Path, config: DiffusionConfig) -> "StableDiffusion":
    """Load a diffusers folder in full precision. Raises ConfigError for an incomplete one."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True, dtype=torch.float32)
        vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True, torch_dtype=torch.float32)
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True, torch_dtype=torch.float32)
        noise_scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{folder} cannot be loaded as Stable Diffusion: {reason}") from error
    return StableDiffusion(tokenizer, text_encoder, vae, unet, noise_scheduler, config)


class StableDiffusion:
    """A loaded model on its device."""

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        noise_scheduler: DDPMScheduler,
        config: DiffusionConfig,
    ) -> None:
        self.config = config
        self.device = choose_device(config)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder.to(self.device).eval().requires_grad_(False)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.unet = unet.to(self.device).eval().requires_grad_(False)
        self.noise_scheduler = noise_scheduler
        self.num_train_timesteps = int(noise_scheduler.config.num_train_timesteps)

    def trainable_modules(self, *, is_text_encoder_trained: bool) -> dict[str, nn.Module]:
        """Return the UNet and, where asked for, the text encoder."""
        modules: dict[str, nn.Module] = {"unet": self.unet}
        if is_text_encoder_trained:
            modules["text_encoder"] = self.text_encoder
        return modules

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids `(B, L)`, padded and cut to the tokenizer's length."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        input_ids: Tensor = tokens.input_ids
        return input_ids

    def encode_prompts(self, input_ids: Tensor) -> Tensor:
        """Return `encoder_hidden_states` `(B, L, D)`."""
        states: Tensor = self.text_encoder(input_ids.to(self.device)).last_hidden_state
        return states

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> Posterior:
        """Return the posterior, scaled to the UNet's latents."""
        posterior = self.vae.encode(pixel_values.to(self.device)).latent_dist
        factor = self.vae.config.scaling_factor
        return Posterior(mean=posterior.mean * factor, std=posterior.std * factor)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return `noisy_latents`."""
        noisy: Tensor = self.noise_scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def compute_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noise or velocity (arXiv 2202.00512), as the scheduler's prediction type says."""
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            velocity: Tensor = self.noise_scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        return noise

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Return the UNet's prediction."""
        prediction: Tensor = self.unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        return prediction

    @torch.no_grad()
    def sample(
        self,
        requests: Sequence[SamplingRequest],
        *,
        num_inference_steps: int,
        guidance_scale: float,
    ) -> list[Image.Image]:
        """Draw one picture per request, both halves of the guidance in one forward."""
        with torch.autocast(self.device.type, DTYPES[self.config.precision], enabled=self.config.precision != "fp32"):
            prompts = [request.prompt for request in requests]
            input_ids = self.tokenize([*([""] * len(prompts)), *prompts])
            states = self.encode_prompts(input_ids)
            sampler = SAMPLERS[self.config.sampler].from_config(self.noise_scheduler.config)
            sampler.set_timesteps(num_inference_steps, device=self.device)
            latents = self.draw_latents(requests) * sampler.init_noise_sigma
            for timestep in sampler.timesteps:
                doubled = sampler.scale_model_input(torch.cat([latents, latents]), timestep)
                plain, prompted = self.predict(doubled, timestep, states).float().chunk(2)
                guided = plain + guidance_scale * (prompted - plain)
                latents = sampler.step(guided, timestep, latents, return_dict=False)[0]
            pixels = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return [Image.fromarray(row.permute(1, 2, 0).cpu().numpy()) for row in levels]

    def draw_latents(self, requests: Sequence[SamplingRequest]) -> Tensor:
        """Return start noise `(B, C, h, w)`; each row depends on its own seed alone."""
        side = self.config.resolution // (2 ** (len(self.vae.config.block_out_channels) - 1))
        shape = (self.unet.config.in_channels, side, side)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(request.seed)) for request in requests]
        return torch.stack(rows).to(self.device)

    def save(self, folder: Path) -> None:
        """Write a folder that `StableDiffusionPipeline.from_pretrained` reads."""
        parts: dict[str, Any] = {
            "scheduler": DDIMScheduler.from_config(self.noise_scheduler.config),
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "unet": self.unet,
            "vae": self.vae,
        }
        # The pipeline class could write this too, but importing it takes seconds of every start.
        index: dict[str, Any] = {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": diffusers.__version__,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
        }
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            library = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
            index[name] = [library, type(part).__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
