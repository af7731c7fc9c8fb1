"""The encoders that measure: CLIP for pictures and prompts, a self-supervised ViT for pictures."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from tasks.encoders.config import EncoderConfig
from tasks.encoders.folders import find_encoders

BATCH_SIZE = 32


class Preprocessor:
    """Resize, crop and normalize as the encoder's own `preprocessor_config.json` says."""

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        size = settings.get("crop_size") or settings["size"]
        self.side = size if isinstance(size, int) else int(size.get("height") or size["shortest_edge"])
        self.mean = torch.tensor(settings["image_mean"]).view(3, 1, 1)
        self.std = torch.tensor(settings["image_std"]).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return `(3, side, side)`."""
        fitted = ImageOps.fit(image.convert("RGB"), (self.side, self.side), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
        values = pixels.view(self.side, self.side, 3).permute(2, 0, 1).float() / 255
        return (values - self.mean) / self.std


class Encoders:
    """CLIP and DINO descriptors, all of length one."""

    def __init__(self, config: EncoderConfig, device: torch.device) -> None:
        self.device = device
        clip, dino = find_encoders(config)
        self.clip = CLIPModel.from_pretrained(clip, dtype=torch.float32, weights_only=True).to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(clip)
        self.clip_preprocess = Preprocessor(clip)
        self.dino = ViTModel.from_pretrained(dino, dtype=torch.float32, weights_only=True, add_pooling_layer=False)
        self.dino = self.dino.to(device).eval()
        self.dino_preprocess = Preprocessor(dino)

    @torch.no_grad()
    def encode_clip(self, images: list[Image.Image]) -> Tensor:
        """Return CLIP image descriptors `(N, D)`."""
        rows = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = torch.stack([self.clip_preprocess(i) for i in images[start : start + BATCH_SIZE]])
            pooled = self.clip.vision_model(pixel_values=batch.to(self.device)).pooler_output
            rows.append(self.clip.visual_projection(pooled))
        return F.normalize(torch.cat(rows), dim=1)

    @torch.no_grad()
    def encode_dino(self, images: list[Image.Image]) -> Tensor:
        """Return DINO descriptors (the CLS token) `(N, D)`."""
        rows = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = torch.stack([self.dino_preprocess(i) for i in images[start : start + BATCH_SIZE]])
            rows.append(self.dino(pixel_values=batch.to(self.device)).last_hidden_state[:, 0])
        return F.normalize(torch.cat(rows), dim=1)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Return CLIP text descriptors `(N, D)`."""
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.clip.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        pooled = self.clip.text_model(input_ids=tokens.input_ids.to(self.device)).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=1)
