"""Subject and prompt fidelity of samples during training."""

import torch
from PIL import Image

from tasks.encoders.embeddings import Encoders
from tasks.prompts import write_plain_prompt
from tasks.training.callbacks.samples import generate_samples
from tasks.training.module import DreamBoothModule
from tasks.training.process.worker_spec import TrainingSpec


class SimilarityMetric:
    """DINO similarity to the photos times CLIP-T, on fixed prompts and seeds: high only where both are."""

    def __init__(self, spec: TrainingSpec, device: torch.device) -> None:
        assert spec.encoders is not None
        self.encoders = Encoders(spec.encoders, device)
        photos = []
        for image in spec.instance_images:
            with Image.open(image.path) as opened:
                photos.append(opened.convert("RGB"))
        self.photos = self.encoders.encode_dino(photos)
        prompts = spec.training.validation.sample_prompts
        self.texts = self.encoders.encode_texts([write_plain_prompt(p, class_noun=spec.class_noun) for p in prompts])

    def measure(self, module: DreamBoothModule) -> torch.Tensor:
        """Return DINO x CLIP-T of samples of the current weights: a scalar on the CPU."""
        rows = generate_samples(module)
        pictures = [picture for row in rows for picture in row]
        # Embeddings have unit length, so products are cosines: (samples, photos).
        dino = (self.encoders.encode_dino(pictures) @ self.photos.T).mean()
        # `generate_samples` orders by prompt: each text embedding belongs to as many samples in a row.
        texts = self.texts.repeat_interleave(len(rows[0]), dim=0)
        clip_t = (self.encoders.encode_clip(pictures) * texts).sum(1).mean()
        return (dino * clip_t).cpu()
