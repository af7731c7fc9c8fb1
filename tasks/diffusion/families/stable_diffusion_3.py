"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): rectified flow, MMDiT, up to three text encoders."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.families.stable_diffusion import CLIP_LORA_TARGETS
from tasks.diffusion.lora.kohya import OriginalLayer
from tasks.diffusion.noise_schedulers import RectifiedFlow
from tasks.diffusion.types import Conditioning

CLIP_LENGTH = 77
T5_LENGTH = 256
BLOCK, ORIGINAL = "transformer_blocks.{n}", "joint_blocks.{n}"
# Layers of the original Stability AI checkpoint; `attn2` is the dual attention (MMDiT-X) of 3.5 Medium.
ORIGINAL_LAYERS = (
    *(OriginalLayer(f"{ORIGINAL}.x_block.{attn}.qkv", tuple(f"{BLOCK}.{attn}.to_{x}" for x in "qkv"))
      for attn in ("attn", "attn2")),
    OriginalLayer(f"{ORIGINAL}.context_block.attn.qkv", tuple(f"{BLOCK}.attn.add_{x}_proj" for x in "qkv")),
    *(OriginalLayer(f"{ORIGINAL}.{theirs}", (f"{BLOCK}.{ours}",)) for theirs, ours in {
        "x_block.attn.proj": "attn.to_out.0",
        "x_block.attn2.proj": "attn2.to_out.0",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "x_block.adaLN_modulation.1": "norm1.linear",
        "context_block.attn.proj": "attn.to_add_out",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
        "context_block.adaLN_modulation.1": "norm1_context.linear",
    }.items()),
    *(OriginalLayer(theirs, (ours,)) for theirs, ours in {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    }.items()),
)  # fmt: skip


class StableDiffusion3(DiffusionModel):
    """A loaded model on its device."""

    pipeline_class = "StableDiffusion3Pipeline"
    denoiser_name = "transformer"
    denoiser_class = "SD3Transformer2DModel"
    noise_class = RectifiedFlow
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    is_any_encoder_optional = True
    max_lengths: ClassVar = {"text_encoder_3": T5_LENGTH}
    lora_targets: ClassVar = {
        # As diffusers' train_dreambooth_lora_sd3.py has them.
        "transformer": (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        ),
        "text_encoder": CLIP_LORA_TARGETS,
        "text_encoder_2": CLIP_LORA_TARGETS,
    }  # fmt: skip
    original_layers = ORIGINAL_LAYERS
    noise_scheduler: RectifiedFlow

    @property
    def architecture(self) -> str:
        """ModelSpec's name: 3.5 Medium has dual attention layers, 3.5 Large has 38 blocks."""
        config = self.denoiser.config
        if getattr(config, "dual_attention_layers", ()):
            return "stable-diffusion-3-5-medium"
        return "stable-diffusion-3-5-large" if config.num_layers >= 38 else "stable-diffusion-3-m"

    def encode_prompts(self, input_ids: Tensor) -> Conditioning:
        """Return states `(B, 77 + 256, D)` and pooled embeddings `(B, P)`.

        Both CLIPs are concatenated along channels and zero-padded to T5's width; T5 follows along the sequence.
        A missing text encoder contributes zeros, as encoders dropped in training do (arXiv 2403.03206).
        """
        ids = self.split_ids(input_ids)
        sizes = self.transformer_sizes()
        clip = [self.encode_clip(name, ids.get(name), len(input_ids)) for name in self.text_encoder_names[:2]]
        # (B, 77, D1 + D2), padded to the width of T5: (B, 77, D)
        states = torch.cat([state for state, _ in clip], -1)
        states = F.pad(states, (0, sizes["states"] - states.shape[-1]))
        if "text_encoder_3" in ids:
            long = self.components["text_encoder_3"](ids["text_encoder_3"]).last_hidden_state
        else:
            long = states.new_zeros(len(input_ids), T5_LENGTH, sizes["states"])
        pooled = torch.cat([pool for _, pool in clip], -1)
        # Along the sequence: (B, 77, D) and (B, 256, D) -> (B, 333, D).
        return Conditioning(torch.cat([states, long.to(states)], 1), pooled)

    def encode_clip(self, name: str, ids: Tensor | None, num: int) -> tuple[Tensor, Tensor]:
        """Return penultimate states `(B, 77, D)` and the pooled projection `(B, P)` of one CLIP, or zeros."""
        if ids is None:
            width = self.missing_width(name)
            return (
                torch.zeros(num, CLIP_LENGTH, width, device=self.device),
                torch.zeros(num, width, device=self.device),
            )
        out = self.components[name](ids, output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds

    def missing_width(self, name: str) -> int:
        """Return the width of a missing CLIP: the pooled width less the other CLIP's."""
        pooled = self.transformer_sizes()["pooled"]
        others = [n for n in self.text_encoder_names[:2] if n != name and n in self.components]
        if others:
            return pooled - int(self.components[others[0]].config.projection_dim)
        # Both are missing: the split between them is irrelevant, only the sum counts.
        return pooled if name == "text_encoder" else 0

    def transformer_sizes(self) -> dict[str, int]:
        """Return the channel widths of states and pooled embeddings that the transformer expects."""
        config = self.denoiser.config
        return {"states": int(config.joint_attention_dim), "pooled": int(config.pooled_projection_dim)}

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, *, time_ids: Tensor
    ) -> Tensor:
        """Return the transformer's flow; `time_ids` are unused."""
        prediction: Tensor = self.denoiser(
            hidden_states=noisy_latents,
            timestep=timesteps,  # in [0, 1000]: unlike Flux's, this transformer does not scale them
            encoder_hidden_states=conditioning.encoder_hidden_states,
            pooled_projections=conditioning.pooled_prompt_embeds,
            return_dict=False,
        )[0]
        return prediction

    def pipeline_inputs(self, prompts: list[str], negative_prompts: list[str] | None = None) -> dict[str, Any]:
        """Return embeddings of the prompts and of the negative prompts."""
        prompt_embeds = self.encode_prompts(self.tokenize(prompts))
        negative_prompt_embeds = self.encode_prompts(self.tokenize(negative_prompts or [""] * len(prompts)))
        return {
            "prompt_embeds": prompt_embeds.encoder_hidden_states,
            "pooled_prompt_embeds": prompt_embeds.pooled_prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds.encoder_hidden_states,
            "negative_pooled_prompt_embeds": negative_prompt_embeds.pooled_prompt_embeds,
        }
