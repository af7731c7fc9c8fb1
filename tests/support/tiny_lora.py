"""Adapters on tiny models of every family: what may be adapted, and what it changes."""

import torch

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.lora.adapters import LoraExport, LoraHyperparameters, add_lora

UNET_TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed-forward": ("ff.net.0.proj", "ff.net.2"),
    "attention and feed-forward": ("to_q", "to_out.0", "ff.net.2"),
    "convolutions": ("conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "proj_in", "proj_out"),
    "up- and downsamplers": ("downsamplers.0.conv", "upsamplers.0.conv", "to_k"),
    "time embeddings": ("time_emb_proj", "time_embedding.linear_1", "time_embedding.linear_2"),
}
TRANSFORMER_TARGETS = {
    "attention": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    "attention to the text": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    "feed-forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    "attention and norms": ("attn.to_q", "norm1.linear", "norm1_context.linear", "norm_out.linear"),
    "embeddings": ("context_embedder", "timestep_embedder.linear_1", "text_embedder.linear_2", "attn.to_v"),
}
TARGETS = {
    "stable_diffusion": UNET_TARGETS,
    "stable_diffusion_xl": {**UNET_TARGETS, "added embeddings": ("add_embedding.linear_1", "to_v")},
    "stable_diffusion_3": {**TRANSFORMER_TARGETS, "patches": ("pos_embed.proj", "proj_out", "attn.to_v")},
    "flux": {
        **TRANSFORMER_TARGETS,
        "single blocks": ("proj_mlp", "proj_out", "norm.linear", "attn.to_k"),
        "patches": ("x_embedder", "proj_out"),
    },
}
EXPORT = LoraExport(alpha=6.0, save_precision="fp32", title="sks fish", trigger_phrase="sks fish")


def adapt(model: DiffusionModel, targets: tuple[str, ...] = (), *, use_dora: bool = False) -> list[str]:
    """Add adapters that change something, as training would leave them."""
    names = list(model.trainable_modules(train_text_encoder=True))
    torch.manual_seed(1)
    add_lora(
        model, names, LoraHyperparameters(rank=3, lora_alpha=EXPORT.alpha, use_dora=use_dora, target_modules=targets)
    )
    with torch.no_grad():
        for name in names:
            for key, parameter in model.components[name].named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.05)
                elif "lora_magnitude" in key:
                    parameter.mul_(1.1)
    return names


@torch.no_grad()
def predict(model: DiffusionModel) -> torch.Tensor:
    """Return what the denoiser says of one fixed noisy latent and prompt."""
    model.denoiser.eval()
    shape = (1, model.vae.config.latent_channels, 16, 16)
    noisy = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    states = model.encode_prompts(model.tokenize(["a photo of sks fish"]))
    time_ids = torch.tensor([[64.0, 48, 0, 8, 32, 32]])
    return model.predict(noisy, model.noise_scheduler.sample_timesteps(torch.tensor([0.5])), states, time_ids=time_ids)
