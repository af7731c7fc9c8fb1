"""Flux.1: rectified flow in a transformer over packed latents, with guidance distilled into it."""

from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tasks.diffusion.base import Conditioning
from tasks.diffusion.latent_model import LatentModel
from tasks.diffusion.noise import RectifiedFlow
from tasks.diffusion.stable_diffusion import CLIP_LORA_TARGETS

T5_LENGTH = 512
TRAINING_GUIDANCE = 1.0  # photos are the plain distribution, not the one that guidance sharpens


class Flux(LatentModel):
    """A loaded model on its device."""

    pipeline_class = "FluxPipeline"
    denoiser_name = "transformer"
    denoiser_class = "FluxTransformer2DModel"
    noise_class = RectifiedFlow
    text_encoder_names = ("text_encoder", "text_encoder_2")
    max_lengths: ClassVar = {"text_encoder_2": T5_LENGTH}
    lora_targets: ClassVar = {
        "transformer": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        "text_encoder": CLIP_LORA_TARGETS,
    }
    noise: RectifiedFlow

    def encode_prompts(self, input_ids: Tensor) -> Conditioning:
        """Return T5's states and CLIP's pooled text."""
        ids = self.split_ids(input_ids)
        pooled = self.parts["text_encoder"](ids["text_encoder"]).pooler_output
        return Conditioning(self.parts["text_encoder_2"](ids["text_encoder_2"]).last_hidden_state, pooled)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: Tensor) -> Tensor:
        """Return the transformer's prediction, packed 2x2 on the way in and unpacked on the way out."""
        rows, channels, height, width = noisy_latents.shape
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((rows,), TRAINING_GUIDANCE, device=noisy_latents.device)
        states = conditioning.encoder_hidden_states
        packed: Tensor = self.denoiser(
            hidden_states=pack(noisy_latents),
            timestep=timesteps / self.noise.num_train_timesteps,
            guidance=guidance,
            pooled_projections=conditioning.pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=noisy_latents.device),
            img_ids=make_image_ids(height // 2, width // 2).to(noisy_latents.device),
            return_dict=False,
        )[0]
        patches = packed.view(rows, height // 2, width // 2, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels, height, width)

    def make_sampler(self) -> Any:
        """Return the flow's Euler steps, the only method that the family is used with."""
        return FlowMatchEulerDiscreteScheduler.from_config(self.noise.scheduler.config)

    def pipeline_inputs(self, prompts: list[str]) -> dict[str, Any]:
        """Return encoded prompts; guidance is a number for the transformer, no second forward."""
        told = self.encode_prompts(self.tokenize(prompts))
        return {"prompt_embeds": told.encoder_hidden_states, "pooled_prompt_embeds": told.pooled}


def pack(latents: Tensor) -> Tensor:
    """Return `(B, h/2 * w/2, 4C)` from `(B, C, h, w)`."""
    rows, channels, height, width = latents.shape
    patches = latents.view(rows, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, (height // 2) * (width // 2), channels * 4)


def make_image_ids(height: int, width: int) -> Tensor:
    """Return the positions `(h * w, 3)` that the transformer's rotary embedding reads."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None]
    return ids.reshape(-1, 3)
