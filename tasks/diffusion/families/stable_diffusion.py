"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, noise or velocity prediction."""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.noise_schedulers import GaussianDiffusion
from tasks.diffusion.types import Conditioning, OnStep, SamplingRequest

UNET_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class StableDiffusion(DiffusionModel):
    """A loaded model on its device."""

    pipeline_class = "StableDiffusionPipeline"
    denoiser_name = "unet"
    denoiser_class = "UNet2DConditionModel"
    noise_class = GaussianDiffusion
    text_encoder_names = ("text_encoder",)
    unused_components = ("feature_extractor", "image_encoder", "safety_checker")
    fixed_settings: ClassVar = {"requires_safety_checker": False}
    has_unused_parameters = False
    lora_targets: ClassVar = {"unet": UNET_LORA_TARGETS, "text_encoder": CLIP_LORA_TARGETS}
    noise_scheduler: GaussianDiffusion

    @property
    def architecture(self) -> str:
        """ModelSpec's name; 2.x is recognized by OpenCLIP's width of 1024."""
        if self.denoiser.config.cross_attention_dim != 1024:
            return "stable-diffusion-v1"
        return (
            "stable-diffusion-v2-768-v"
            if self.noise_scheduler.prediction_type == "v_prediction"
            else "stable-diffusion-v2-512"
        )

    def encode_prompts(self, input_ids: Tensor) -> Conditioning:
        """Return `encoder_hidden_states` `(B, L, D)`."""
        return Conditioning(self.components["text_encoder"](input_ids.to(self.device)).last_hidden_state)

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, *, time_ids: Tensor
    ) -> Tensor:
        """Return the UNet's noise or velocity; `time_ids` are unused."""
        states = conditioning.encoder_hidden_states
        prediction: Tensor = self.denoiser(noisy_latents, timesteps, states, return_dict=False)[0]
        return prediction

    @torch.no_grad()
    def sample(
        self,
        requests: Sequence[SamplingRequest],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Sample one image per request, with both halves of classifier-free guidance in one forward.

        Equals `StableDiffusionPipeline`, whose import takes seconds.
        """
        with self.autocast():
            prompts = [request.prompt for request in requests]
            # Unconditional half first, as the split of the prediction expects.
            states = self.encode_prompts(self.tokenize([*(request.negative_prompt for request in requests), *prompts]))
            sampler = self.make_sampler()
            generators = [torch.Generator().manual_seed(request.seed) for request in requests]
            # Schedulers that add noise at each step draw it from the image's own generator, as the initial noise.
            drawn = {"generator": generators} if "generator" in inspect.signature(sampler.step).parameters else {}
            sampler.set_timesteps(num_inference_steps, device=self.device)
            # Euler starts from noise of a standard deviation near sigma_max, the others from unit noise.
            latents = self.draw_latents(generators) * sampler.init_noise_sigma
            for number, timestep in enumerate(sampler.timesteps, 1):
                # (2B, C, h, w); Euler divides by sqrt(sigma^2 + 1).
                doubled = sampler.scale_model_input(torch.cat([latents, latents]), timestep)
                # float32 before the scheduler step: its arithmetic would lose precision in half.
                plain, prompted = self.predict(doubled, timestep, states, time_ids=torch.empty(0)).float().chunk(2)
                guided = plain + guidance_scale * (prompted - plain)  # classifier-free guidance (arXiv 2207.12598)
                if guidance_rescale:
                    guided = rescale_guidance(guided, prompted, guidance_rescale)
                latents = sampler.step(guided, timestep, latents, **drawn, return_dict=False)[0]
                if on_step is not None:
                    on_step(number, len(sampler.timesteps))
        return self.decode(latents)

    def draw_latents(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return initial noise of unit variance `(B, C, h, w)`; a row depends on its own seed alone."""
        side = self.config.resolution // (2 ** (len(self.vae.config.block_out_channels) - 1))
        shape = (self.denoiser.config.in_channels, side, side)
        # CPU generators: the same initial noise on every device.
        rows = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.stack(rows).to(self.device)

    def pipeline_inputs(self, prompts: list[str], negative_prompts: list[str] | None = None) -> dict[str, Any]:
        """Return embeddings of the prompts and of the negative prompts."""
        prompt_embeds, negative_prompt_embeds = (
            self.encode_prompts(self.tokenize(texts)) for texts in (prompts, negative_prompts or [""] * len(prompts))
        )
        return {
            "prompt_embeds": prompt_embeds.encoder_hidden_states,
            "negative_prompt_embeds": negative_prompt_embeds.encoder_hidden_states,
        }

    def saved_scheduler(self) -> Any:
        """Return DDIM, the most widely supported."""
        return DDIMScheduler.from_config(self.noise_scheduler.scheduler.config)


def rescale_guidance(guided: Tensor, prompted: Tensor, rescale: float) -> Tensor:
    """Return guided predictions `(B, C, h, w)`, blended with ones of the prompted standard deviation per image.

    arXiv 2305.08891, section 3.4: guidance alone raises the deviation, which over-exposes.
    """
    axes = (1, 2, 3)
    matched = guided * (prompted.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
    return rescale * matched + (1 - rescale) * guided
