"""Embedding models of the metrics: CLIP for images and prompts, a self-supervised ViT (DINO) for images."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from tasks.encoders.config import EncoderConfig
from tasks.encoders.folders import find_class, find_encoders, read_preprocessor
from tasks.errors import ConfigError

BATCH_SIZE = 32


class Preprocessor:
    """Resize, crop and normalize according to the encoder's `preprocessor_config.json`, as transformers does.

    A size of height and width ignores the aspect ratio, `shortest_edge` preserves it. A plain number means the
    shortest edge for CLIP and height and width for a ViT. `resize` overrides the size: the shortest edge, followed by
    a center crop to the configured size.
    """

    def __init__(self, folder: Path, *, resize: int | None = None) -> None:
        settings = read_preprocessor(folder)
        kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
        size, crop = settings.get("size", 224), settings.get("crop_size")
        if isinstance(size, int):
            size = {"height": size, "width": size} if "ViT" in kind else {"shortest_edge": size}
        self.size: dict[str, int] = size if settings.get("do_resize", True) else {}
        if not settings.get("do_center_crop", crop is not None):
            crop = None
        self.crop = (crop, crop) if isinstance(crop, int) else crop and (int(crop["width"]), int(crop["height"]))
        if resize is not None:
            side = int(size.get("height") or size["shortest_edge"])
            self.size, self.crop = {"shortest_edge": resize}, self.crop or (side, side)
        # The evaluation code of the papers resizes bicubically before its center crop.
        plain = settings.get("resample", Image.Resampling.BICUBIC)
        self.resample = Image.Resampling(Image.Resampling.BICUBIC if resize is not None else plain)
        self.factor = float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0
        is_normalized = settings.get("do_normalize", True)
        self.mean = torch.tensor(settings["image_mean"] if is_normalized else [0.0] * 3).view(3, 1, 1)
        self.std = torch.tensor(settings["image_std"] if is_normalized else [1.0] * 3).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return normalized pixels `(3, H, W)`, float32."""
        picture = image.convert("RGB")
        if "shortest_edge" in self.size:
            # The long edge is truncated, not rounded, as transformers computes it.
            edge, short = self.size["shortest_edge"], min(picture.size)
            picture = picture.resize((edge * picture.width // short, edge * picture.height // short), self.resample)
        elif self.size:
            picture = picture.resize((self.size["width"], self.size["height"]), self.resample)
        if self.crop:
            width, height = self.crop
            # Negative where the image is smaller.
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            # Pillow pads with black where the image is smaller than the crop, as transformers does.
            picture = picture.crop((left, top, left + width, top + height))
        # A bytearray, since `frombuffer` warns about read-only buffers.
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        # HWC uint8 -> CHW float32.
        values = pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).float() * self.factor
        return (values - self.mean) / self.std


def load_encoder(folder: Path, kind: str) -> Any:
    """Return an encoder in float32. Raises ConfigError where weights are missing: they would be random."""
    name = find_class(folder, kind)
    # DINO checkpoints have no pooler, which transformers would initialize at random.
    extra = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model, report = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, weights_only=True, output_loading_info=True, **extra
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(f"{folder} lacks {len(missing)} weights of a {name} ({missing[0]}); see evaluation.encoders")
    return model


class Encoders:
    """CLIP and DINO embeddings, all L2-normalized, so that dot products are cosines."""

    def __init__(self, config: EncoderConfig, device: torch.device) -> None:
        self.device = device
        clip, dino = find_encoders(config)
        # float32 whatever the checkpoint stores; the mini encoders are float16.
        self.clip = load_encoder(clip, "clip").to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(clip)
        self.clip_preprocess = Preprocessor(clip)
        self.dino = load_encoder(dino, "dino").to(device).eval()
        self.dino_preprocess = Preprocessor(dino, resize=config.dino_resize)

    @torch.no_grad()
    def encode_clip(self, images: list[Image.Image]) -> Tensor:
        """Return CLIP image embeddings `(N, D)`."""
        rows = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = torch.stack([self.clip_preprocess(i) for i in images[start : start + BATCH_SIZE]])
            # Through the submodules: the projection of the pooled output is the joint CLIP space.
            pooled = self.clip.vision_model(pixel_values=batch.to(self.device)).pooler_output
            rows.append(self.clip.visual_projection(pooled))
        return F.normalize(torch.cat(rows), dim=1)

    @torch.no_grad()
    def encode_dino(self, images: list[Image.Image]) -> Tensor:
        """Return DINO embeddings (the CLS token) `(N, D)`."""
        rows = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = torch.stack([self.dino_preprocess(i) for i in images[start : start + BATCH_SIZE]])
            rows.append(self.dino(pixel_values=batch.to(self.device)).last_hidden_state[:, 0])
        return F.normalize(torch.cat(rows), dim=1)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Return CLIP text embeddings `(N, D)`."""
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.clip.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        pooled = self.clip.text_model(input_ids=tokens.input_ids.to(self.device)).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=1)
