"""The mini vision server's model: zero-shot classification by the mini CLIP, and color counts."""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from tasks.diffusion.hub import MINI_FOLDER
from tasks.mini.pretrain.tokens import MAX_LENGTH
from tasks.mini.world.scenes import CLASS_NOUNS, COLORS, IMAGE_SIZE, PLACE_PHRASES, PLACES

# The ellipse in which colors are counted, in fractions of the sides. Objects are sampled around its center, so it
# stands in for a segmentation.
CENTER, RADII = (0.5, 0.57), (0.3, 0.28)
# RGB rows: the world's ten colors, then those of outlines and metal, which would otherwise count as one of the ten.
PALETTE = np.array([*COLORS.values(), (46, 38, 58), (150, 156, 168)], float)
PALETTE_NAMES = (*COLORS, "outline", "gray")


@dataclass(frozen=True)
class Observation:
    """What the model recognizes in one picture."""

    class_noun: str
    class_probabilities: dict[str, float]
    """Probability of each class noun; they sum to one."""
    place: str
    colors: tuple[str, ...]
    """Names of the main colors near the middle, most frequent first."""
    brightness: float


class VisionModel:
    """The mini CLIP and a palette."""

    def __init__(self) -> None:
        folder = MINI_FOLDER / "clip"
        self.clip = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.scale = float(self.clip.logit_scale.detach().exp())
        # Cached per instance; a decorator on the method would keep every instance alive.
        self.encode_texts = lru_cache(maxsize=256)(self._encode_texts)

    @torch.no_grad()
    def encode_image(self, image: Image.Image) -> torch.Tensor:
        """Return the picture's L2-normalized embedding, `(128,)`."""
        small = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float()[None] / 127.5 - 1
        pooled = self.clip.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=1)[0]

    @torch.no_grad()
    def _encode_texts(self, texts: tuple[str, ...]) -> torch.Tensor:
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
        )
        pooled = self.clip.text_model(input_ids=tokens.input_ids).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=1)

    def choose(self, image: Image.Image, texts: tuple[str, ...]) -> torch.Tensor:
        """Return the probability of each text, `(len(texts),)`, by the softmax of scaled cosines."""
        return (self.scale * self.encode_texts(texts) @ self.encode_image(image)).softmax(0)

    def compare(self, first: Image.Image, second: Image.Image) -> float:
        """Return the cosine similarity of two pictures' embeddings."""
        return float(self.encode_image(first) @ self.encode_image(second))

    def observe(self, image: Image.Image) -> Observation:
        """Return class noun, place and colors of a picture."""
        nouns = self.choose(image, tuple(f"a photo of a {noun}" for noun in CLASS_NOUNS))
        phrases = tuple((place, phrase) for place in PLACES for phrase in PLACE_PHRASES[place])
        noun = CLASS_NOUNS[int(nouns.argmax())]
        # The place is chosen given the noun, and sums over its phrasings: each alone could lose to another place.
        scores = self.choose(image, tuple(f"a photo of a {noun} {phrase}" for _, phrase in phrases))
        by_place = {
            place: float(sum(score for (name, _), score in zip(phrases, scores, strict=True) if name == place))
            for place in PLACES
        }
        place = max(by_place, key=lambda name: by_place[name])
        counts = count_colors(image)
        order = np.argsort(counts)[::-1]
        colors = tuple(PALETTE_NAMES[i] for i in order if counts[i] > 0.12 and PALETTE_NAMES[i] in COLORS)
        brightness = float(np.asarray(image.convert("L"), float).mean() / 255)
        shares = dict(zip(CLASS_NOUNS, nouns.tolist(), strict=True))
        return Observation(noun, shares, place, colors[:3], brightness)


def count_colors(image: Image.Image) -> np.ndarray:
    """Return the fraction of each palette color within the central ellipse, `(12,)`, summing to one."""
    small = np.asarray(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX), float)
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] / IMAGE_SIZE
    inside = ((x - CENTER[0]) / RADII[0]) ** 2 + ((y - CENTER[1]) / RADII[1]) ** 2 <= 1
    pixels = small[inside]
    # `(num_pixels, 1, 3) - (1, 12, 3)`: squared RGB distances suffice, since the palette is far apart.
    nearest = ((pixels[:, None] - PALETTE[None]) ** 2).sum(2).argmin(1)
    return np.bincount(nearest, minlength=len(PALETTE)) / len(pixels)


def compare_colors(first: Image.Image, second: Image.Image) -> float:
    """Return the intersection of two pictures' color histograms, 0 to 1."""
    return float(np.minimum(count_colors(first), count_colors(second)).sum())


def open_picture(data: bytes) -> Image.Image:
    """Return the RGB picture of encoded bytes. Raises ValueError for anything else."""
    # Formats are listed, so that hostile bytes reach none of Pillow's rarer decoders.
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF")) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("image_url holds no PNG, JPEG, WebP or GIF picture") from error
