"""Architectures of the mini models, each in the format of the library that loads it."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTModel,
)

from tasks.mini.pretrain.tokens import MAX_LENGTH
from tasks.mini.world.scenes import CLASS_NOUNS, COLORS, IMAGE_SIZE, PLACES

LATENT_SIZE = IMAGE_SIZE // 4  # three VAE blocks, of which the last does not downsample
HIDDEN_SIZE = 128
HEADS = {"class_noun": CLASS_NOUNS, "color": tuple(COLORS), "place": PLACES}


def build_vae() -> AutoencoderKL:
    """Return the autoencoder: 64x64 RGB to 4x16x16 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=IMAGE_SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """Return the denoiser of 4x16x16 latents; cross-attention at 8x8 and 4x4 only, where it is cheap on a CPU."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 144),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=HIDDEN_SIZE,
        attention_head_dim=4,  # diffusers reads it as the number of heads (its issue 2011)
        norm_num_groups=16,
    )


def build_noise_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_clip(vocabulary_size: int) -> CLIPModel:
    """Return the two-tower model; its text tower conditions the denoiser."""
    shared = {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 4 * HIDDEN_SIZE,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": HIDDEN_SIZE,
    }
    text = CLIPTextConfig(
        **shared,
        vocab_size=vocabulary_size,
        max_position_embeddings=MAX_LENGTH,
        # The tokenizer appends its two special tokens last. Padding repeats the end token, as in OpenAI's CLIP; the
        # pooled state is that of the first end token.
        bos_token_id=vocabulary_size - 2,
        eos_token_id=vocabulary_size - 1,
        pad_token_id=vocabulary_size - 1,
    )
    vision = CLIPVisionConfig(**shared, image_size=IMAGE_SIZE, patch_size=8)  # 8 x 8 patches of 8 px
    model = CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=HIDDEN_SIZE,
        )
    )
    model.set_attn_implementation("eager")  # faster backward pass than sdpa in bfloat16 on a CPU
    return model


def build_dino() -> ViTModel:
    """Return the self-supervised image encoder; its CLS token is the embedding."""
    model = ViTModel(
        ViTConfig(
            hidden_size=HIDDEN_SIZE,
            intermediate_size=4 * HIDDEN_SIZE,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=8,
        ),
        add_pooling_layer=False,
    )
    model.set_attn_implementation("eager")  # as in `build_clip`
    return model


class SceneClassifier(nn.Module):
    """Classifies class noun, color and place of a picture; used only to evaluate the base model."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out_channels in (width, 2 * width, 4 * width, 4 * width):
            layers += [
                nn.Conv2d(channels, out_channels, 3, padding=1),
                nn.GroupNorm(8, out_channels),
                nn.SiLU(),
                nn.MaxPool2d(2),
            ]
            channels = out_channels
        # Four poolings: 64x64 to 4x4, hence 16 positions per channel.
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 96), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(96, len(v)) for name, v in HEADS.items()})

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Map ``(B, 3, 64, 64)`` in [-1, 1] to logits by head name."""
        features = self.features(pixel_values)
        return {name: head(features) for name, head in self.heads.items()}


def to_pixel_values(images: Tensor) -> Tensor:
    """Map uint8 ``(B, 64, 64, 3)`` to float ``(B, 3, 64, 64)`` in [-1, 1]."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
