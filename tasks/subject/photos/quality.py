"""Image statistics of photos without any model, and the quality limits on them."""

import imagehash
import numpy as np
from PIL import Image
from pydantic import BaseModel, Field
from scipy.ndimage import gaussian_filter, uniform_filter

from tasks.manifests.subject import ImageMeasures
from tasks.subject.config import SubjectConfig

MEASURED_SIDE = 256
MIN_BOX = 0.02  # fraction of the photo's area
SALIENCY_SIDE = 64  # as in the paper, see find_salient_box


class Box(BaseModel):
    """A part of a photo, in shares of its width and height."""

    left: float = Field(description="0 to 1")
    top: float = Field(description="0 to 1")
    right: float = Field(description="0 to 1, more than left")
    bottom: float = Field(description="0 to 1, more than top")

    @property
    def area(self) -> float:
        """Area as a fraction of the photo."""
        return (self.right - self.left) * (self.bottom - self.top)

    def find_center(self) -> tuple[float, float] | None:
        """Return the center (x, y) as fractions, or None for a box outside the photo, inverted or tiny."""
        is_inside = 0 <= self.left < self.right <= 1 and 0 <= self.top < self.bottom <= 1
        if not is_inside or self.area < MIN_BOX:
            return None
        return round((self.left + self.right) / 2, 4), round((self.top + self.bottom) / 2, 4)


def measure(image: Image.Image) -> ImageMeasures:
    """Return size, sharpness, brightness, contrast and perceptual hash of an RGB photo.

    Luma is measured at a short side of 256 px, so that limits hold for photos of any size.
    """
    scale = MEASURED_SIDE / min(image.size)
    # At least 3 px a side: the Laplacian is taken at inner pixels.
    size = (max(3, round(image.width * scale)), max(3, round(image.height * scale)))
    luma = np.asarray(image.convert("L").resize(size, Image.Resampling.BICUBIC), np.float64)
    # 4-neighbour Laplacian on luma 0..255; its variance is the sharpness.
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]
    return ImageMeasures(
        width=image.width,
        height=image.height,
        sharpness=round(float(laplacian.var()), 3),
        brightness=round(float(luma.mean() / 255), 4),
        contrast=round(float(luma.std() / 255), 4),
        # 64 bits, of the whole photo at its own size.
        perceptual_hash=str(imagehash.phash(image)),
    )


def find_salient_box(image: Image.Image) -> Box:
    """Return the bounding box of the salient region by spectral residual (Hou & Zhang, CVPR 2007).

    Class-agnostic: the region may be something other than the subject. The whole photo where nothing is salient.
    """
    luma = np.asarray(image.convert("L").resize((SALIENCY_SIDE, SALIENCY_SIDE), Image.Resampling.BOX), np.float64)
    spectrum = np.fft.fft2(luma)
    logs = np.log(np.abs(spectrum) + 1e-8)
    # The log spectrum less its local average, recombined with the original phase.
    residual = np.exp(logs - uniform_filter(logs, 3, mode="wrap"))
    saliency = gaussian_filter(np.abs(np.fft.ifft2(residual * np.exp(1j * np.angle(spectrum)))) ** 2, 2.5)
    # The paper's threshold: three times the mean.
    rows, columns = np.nonzero(saliency > 3 * saliency.mean())
    if len(rows) == 0:
        return Box(left=0, top=0, right=1, bottom=1)
    edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    left, top, right, bottom = (round(float(edge) / SALIENCY_SIDE, 3) for edge in edges)
    return Box(left=left, top=top, right=right, bottom=bottom)


def find_fault(measures: ImageMeasures, config: SubjectConfig) -> str | None:
    """Return the first violated quality limit, or None."""
    side = min(measures.width, measures.height)
    if side < config.min_side:
        return f"too small: {side} px, at least {config.min_side} (subject.min_side)"
    if measures.contrast < config.min_contrast:
        return f"almost one tone: contrast {measures.contrast}, at least {config.min_contrast}"
    if measures.brightness < config.min_brightness:
        return f"too dark: brightness {measures.brightness}, at least {config.min_brightness}"
    if measures.brightness > config.max_brightness:
        return f"too bright: brightness {measures.brightness}, at most {config.max_brightness}"
    if measures.sharpness < config.min_sharpness:
        return f"blurred: sharpness {measures.sharpness}, at least {config.min_sharpness}"
    return None


def hamming_distance(first: str, second: str) -> int:
    """Return the Hamming distance of two perceptual hashes."""
    return int(imagehash.hex_to_hash(first) - imagehash.hex_to_hash(second))
