"""Tiny random-weight models of every family's true architecture, 32 px."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.registry import load_model
from tasks.mini.pretrain.tokens import write_tokenizer
from tests.support.config import make_config
from tests.support.tiny import DEVICE, SIDE, WORDS, make_tiny_stable_diffusion

WIDTH = 16


def make_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    write_tokenizer(folder, WORDS)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def make_clip(tokenizer: CLIPTokenizer, *, is_projected: bool, seed: int) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=WIDTH,
        bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1, pad_token_id=len(tokenizer) - 1,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if is_projected else CLIPTextModel(config)


def make_t5(folder: Path) -> tuple[T5TokenizerFast, T5EncoderModel]:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    torch.manual_seed(4)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=2 * WIDTH, d_ff=32, d_kv=8, num_heads=2, num_layers=2,
    )  # fmt: skip
    return tokenizer, T5EncoderModel(config)


def make_vae(*, channels: int, shift: float | None = None) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=SIDE,
        shift_factor=shift, scaling_factor=0.3,
    )  # fmt: skip


def make_tiny_sdxl(folder: Path) -> Path:
    first, second = (make_clip_tokenizer(folder.parent / name) for name in ("tokenizer", "tokenizer_2"))
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1), cross_attention_dim=2 * WIDTH, attention_head_dim=(2, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=make_vae(channels=4), unet=unet, tokenizer=first, tokenizer_2=second,
        text_encoder=make_clip(first, is_projected=False, seed=2),
        text_encoder_2=make_clip(second, is_projected=True, seed=3),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear"), add_watermarker=False,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def make_tiny_sd3(folder: Path, *, missing: tuple[str, ...] = ()) -> Path:
    first, second = (make_clip_tokenizer(folder.parent / name) for name in ("tokenizer", "tokenizer_2"))
    t5_tokenizer, t5 = make_t5(folder.parent / "tokenizer_3")
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2, patch_size=1, in_channels=8, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=64,
    )  # fmt: skip
    parts = {
        "text_encoder": make_clip(first, is_projected=True, seed=2), "tokenizer": first,
        "text_encoder_2": make_clip(second, is_projected=True, seed=3), "tokenizer_2": second,
        "text_encoder_3": t5, "tokenizer_3": t5_tokenizer,
    }  # fmt: skip
    kept = {name: None if name.replace("tokenizer", "text_encoder") in missing else p for name, p in parts.items()}
    StableDiffusion3Pipeline(
        transformer=transformer, vae=make_vae(channels=8, shift=0.1), **kept,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def make_tiny_flux(folder: Path) -> Path:
    clip_tokenizer = make_clip_tokenizer(folder.parent / "tokenizer")
    t5_tokenizer, t5 = make_t5(folder.parent / "tokenizer_2")
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    FluxPipeline(
        transformer=transformer, vae=make_vae(channels=4, shift=0.1),
        text_encoder=make_clip(clip_tokenizer, is_projected=False, seed=2), tokenizer=clip_tokenizer,
        text_encoder_2=t5, tokenizer_2=t5_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "stable_diffusion": make_tiny_stable_diffusion,
    "stable_diffusion_xl": make_tiny_sdxl,
    "stable_diffusion_3": make_tiny_sd3,
    "flux": make_tiny_flux,
}


def family_config(family: str, folder: Path) -> DiffusionConfig:
    return make_config(
        DiffusionConfig,
        family=family,
        pretrained_model_name_or_path=str(folder),
        resolution=SIDE,
        device=DEVICE,
        sampler="euler",
    )


def open_family(family: str, folder: Path) -> DiffusionModel:
    model = load_model(family_config(family, folder))
    assert isinstance(model, DiffusionModel)
    return model
