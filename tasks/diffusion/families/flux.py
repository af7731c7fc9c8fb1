"""Flux.1: a rectified-flow transformer over packed latents, with distilled guidance."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.families.stable_diffusion import CLIP_LORA_TARGETS
from tasks.diffusion.lora.kohya import OriginalLayer
from tasks.diffusion.noise_schedulers import RectifiedFlow
from tasks.diffusion.types import Conditioning
from tasks.errors import ConfigError

T5_LENGTH = 512
# Photos follow the data distribution, which the distilled guidance models at scale 1.
TRAINING_GUIDANCE = 1.0
DOUBLE, SINGLE = ("transformer_blocks.{n}", "double_blocks.{n}"), ("single_transformer_blocks.{n}", "single_blocks.{n}")
# Layers of the original Black Forest Labs checkpoint, whose names kohya's format uses.
ORIGINAL_LAYERS = (
    OriginalLayer(f"{DOUBLE[1]}.img_attn.qkv", tuple(f"{DOUBLE[0]}.attn.to_{x}" for x in "qkv")),
    OriginalLayer(f"{DOUBLE[1]}.txt_attn.qkv", tuple(f"{DOUBLE[0]}.attn.add_{x}_proj" for x in "qkv")),
    OriginalLayer(f"{SINGLE[1]}.linear1",
                  (*(f"{SINGLE[0]}.attn.to_{x}" for x in "qkv"), f"{SINGLE[0]}.proj_mlp")),
    *(OriginalLayer(f"{DOUBLE[1]}.{theirs}", (f"{DOUBLE[0]}.{ours}",)) for theirs, ours in {
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "img_mod.lin": "norm1.linear",
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "txt_mod.lin": "norm1_context.linear",
    }.items()),
    OriginalLayer(f"{SINGLE[1]}.linear2", (f"{SINGLE[0]}.proj_out",)),
    OriginalLayer(f"{SINGLE[1]}.modulation.lin", (f"{SINGLE[0]}.norm.linear",)),
    *(OriginalLayer(f"{theirs}.{layer}_layer", (f"time_text_embed.{ours}.linear_{number}",))
      for theirs, ours in (("time_in", "timestep_embedder"), ("guidance_in", "guidance_embedder"),
                           ("vector_in", "text_embedder"))
      for layer, number in (("in", 1), ("out", 2))),
    OriginalLayer("img_in", ("x_embedder",)),
    OriginalLayer("txt_in", ("context_embedder",)),
    OriginalLayer("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
    OriginalLayer("final_layer.linear", ("proj_out",)),
)  # fmt: skip


class Flux(DiffusionModel):
    """A loaded model on its device."""

    pipeline_class = "FluxPipeline"
    denoiser_name = "transformer"
    denoiser_class = "FluxTransformer2DModel"
    noise_class = RectifiedFlow
    text_encoder_names = ("text_encoder", "text_encoder_2")
    max_lengths: ClassVar = {"text_encoder_2": T5_LENGTH}
    lora_targets: ClassVar = {
        # As diffusers' train_dreambooth_lora_flux.py has them.
        "transformer": (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
            "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
        ),
        "text_encoder": CLIP_LORA_TARGETS,
    }  # fmt: skip
    original_layers = ORIGINAL_LAYERS
    implementation = "https://github.com/black-forest-labs/flux"
    noise_scheduler: RectifiedFlow

    @property
    def architecture(self) -> str:
        """ModelSpec's name; only the dev model has guidance embeddings."""
        return "flux-1-dev" if self.denoiser.config.guidance_embeds else "flux-1-schnell"

    def encode_prompts(self, input_ids: Tensor) -> Conditioning:
        """Return T5's states `(B, 512, D)` and CLIP's pooled embeddings `(B, P)`."""
        ids = self.split_ids(input_ids)
        pooled = self.components["text_encoder"](ids["text_encoder"]).pooler_output
        return Conditioning(self.components["text_encoder_2"](ids["text_encoder_2"]).last_hidden_state, pooled)

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, *, time_ids: Tensor
    ) -> Tensor:
        """Return the transformer's flow; its input and output are packed in 2x2 patches."""
        rows, channels, height, width = noisy_latents.shape
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((rows,), TRAINING_GUIDANCE, device=noisy_latents.device)  # (B,)
        states = conditioning.encoder_hidden_states
        packed: Tensor = self.denoiser(
            hidden_states=pack(noisy_latents),
            # sigma in [0, 1]: the transformer itself multiplies by 1000.
            timestep=timesteps / self.noise_scheduler.num_train_timesteps,
            guidance=guidance,
            pooled_projections=conditioning.pooled_prompt_embeds,
            encoder_hidden_states=states,
            # Rotary positions: (0, row, column) for patches, all zeros for text.
            txt_ids=torch.zeros(states.shape[1], 3, device=noisy_latents.device),
            img_ids=make_image_ids(height // 2, width // 2).to(noisy_latents.device),
            return_dict=False,
        )[0]
        return unpack(packed, (rows, channels, height, width))

    def unpack_latents(self, latents: Tensor) -> Tensor:
        """Unpack the pipeline's `(B, h/2 * w/2, 4C)` to `(B, C, h, w)`."""
        side = self.config.resolution // 2 ** (len(self.vae.config.block_out_channels) - 1)
        # A 2x2 patch holds 4 values per channel.
        return unpack(latents, (len(latents), latents.shape[-1] // 4, side, side))

    def pipeline_inputs(self, prompts: list[str], negative_prompts: list[str] | None = None) -> dict[str, Any]:
        """Return prompt embeddings; distilled guidance needs no second forward.

        Raises:
            ConfigError: there is a negative prompt.

        """
        if any(negative_prompts or ()):
            raise ConfigError("guidance of Flux is distilled and takes no negative prompt; set it to an empty text")
        conditioning = self.encode_prompts(self.tokenize(prompts))
        return {
            "prompt_embeds": conditioning.encoder_hidden_states,
            "pooled_prompt_embeds": conditioning.pooled_prompt_embeds,
        }


def pack(latents: Tensor) -> Tensor:
    """Pack `(B, C, h, w)` into 2x2 patches, `(B, h/2 * w/2, 4C)`."""
    rows, channels, height, width = latents.shape
    # (B, C, h/2, 2, w/2, 2) -> (B, h/2, w/2, C, 2, 2) -> (B, h/2 * w/2, 4C)
    patches = latents.view(rows, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, (height // 2) * (width // 2), channels * 4)


def unpack(packed: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Invert `pack`: `(B, h/2 * w/2, 4C)` to `shape` `(B, C, h, w)`."""
    rows, channels, height, width = shape
    # (B, h/2, w/2, C, 2, 2) -> (B, C, h/2, 2, w/2, 2) -> (B, C, h, w)
    patches = packed.view(rows, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def make_image_ids(height: int, width: int) -> Tensor:
    """Return rotary positions `(h * w, 3)` of patches: zero, row, column."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]  # (h, 1), broadcast over columns
    ids[..., 2] = torch.arange(width)[None]  # (1, w), broadcast over rows
    return ids.reshape(-1, 3)
