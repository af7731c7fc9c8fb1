"""Stable Diffusion XL (arXiv 2307.01952): two CLIP text encoders, micro-conditioning by `time_ids`, a larger UNet."""

from typing import Any, ClassVar

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.families.stable_diffusion import CLIP_LORA_TARGETS, UNET_LORA_TARGETS
from tasks.diffusion.noise_schedulers import GaussianDiffusion
from tasks.diffusion.types import Conditioning


class StableDiffusionXl(DiffusionModel):
    """A loaded model on its device."""

    pipeline_class = "StableDiffusionXLPipeline"
    denoiser_name = "unet"
    denoiser_class = "UNet2DConditionModel"
    noise_class = GaussianDiffusion
    text_encoder_names = ("text_encoder", "text_encoder_2")
    lora_targets: ClassVar = {
        "unet": UNET_LORA_TARGETS,
        "text_encoder": CLIP_LORA_TARGETS,
        "text_encoder_2": CLIP_LORA_TARGETS,
    }
    index_settings = ("force_zeros_for_empty_prompt",)
    architecture = "stable-diffusion-xl-v1-base"
    implementation = "https://github.com/Stability-AI/generative-models"
    noise_scheduler: GaussianDiffusion

    def encode_prompts(self, input_ids: Tensor) -> Conditioning:
        """Return both encoders' penultimate states, concatenated along channels, and the second one's pooled text."""
        states, pooled = [], None
        for name, ids in self.split_ids(input_ids).items():
            out = self.components[name](ids, output_hidden_states=True)
            states.append(out.hidden_states[-2])
            pooled = out[0]  # `text_embeds` of the second encoder, whose turn is last
        assert pooled is not None
        joined = torch.cat(states, -1)  # (B, L, D1 + D2)
        if not self.settings.get("force_zeros_for_empty_prompt", True):
            return Conditioning(joined, pooled)
        # As in the pipeline, which zeroes the embeddings of the empty negative prompt; dropped captions match it.
        empty = self.tokenize([""]).to(input_ids.device)
        is_nonempty = (input_ids != empty).any(1).to(self.device)  # (B, L1 + L2) against (1, L1 + L2)
        return Conditioning(joined * is_nonempty[:, None, None], pooled * is_nonempty[:, None])

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, *, time_ids: Tensor
    ) -> Tensor:
        """Return the UNet's noise or velocity, conditioned on original size, crop and target size."""
        added = {"text_embeds": conditioning.pooled_prompt_embeds, "time_ids": time_ids.to(noisy_latents)}
        states = conditioning.encoder_hidden_states
        prediction: Tensor = self.denoiser(
            noisy_latents, timesteps, states, added_cond_kwargs=added, return_dict=False
        )[0]
        return prediction

    def saved_scheduler(self) -> Any:
        """Return Euler, the base model's default."""
        return EulerDiscreteScheduler.from_config(self.noise_scheduler.scheduler.config)

    def pipeline_inputs(self, prompts: list[str], negative_prompts: list[str] | None = None) -> dict[str, Any]:
        """Return embeddings of the prompts and of the negative prompts."""
        conditioning = self.encode_prompts(self.tokenize(prompts))
        negative = self.encode_prompts(self.tokenize(negative_prompts or [""] * len(prompts)))
        return {
            "prompt_embeds": conditioning.encoder_hidden_states,
            "pooled_prompt_embeds": conditioning.pooled_prompt_embeds,
            "negative_prompt_embeds": negative.encoder_hidden_states,
            "negative_pooled_prompt_embeds": negative.pooled_prompt_embeds,
        }
