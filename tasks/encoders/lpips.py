"""LPIPS (arXiv 1801.03924), version 0.1 on AlexNet: perceptual distance of two images.

The network is defined here, so that neither torchvision nor the package `lpips` is imported; only their weight
files are read.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

# ImageNet mean and deviation, for inputs in [-1, 1] instead of [0, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
COMPARED = (1, 4, 7, 9, 11)  # AlexNet's layers after each ReLU


class Lpips(nn.Module):
    """The perceptual distance of images of equal size.

    Args:
        trunk: torchvision's AlexNet, `features.N.weight` and `.bias`.
        linear: the calibration of the package `lpips`, `linN.model.1.weight`.

    """

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: dict[str, Tensor], linear: dict[str, Tensor]) -> None:
        super().__init__()
        self.features = make_alexnet()
        self.features.load_state_dict(
            {key.removeprefix("features."): value for key, value in trunk.items() if key.startswith("features.")}
        )
        # Each (1, C, 1, 1).
        self.weights = nn.ParameterList([linear[f"lin{i}.model.1.weight"] for i in range(len(COMPARED))])
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return distances `(B,)` of `(B, 3, H, W)` in [-1, 1]."""
        total = first.new_zeros(len(first))
        for weight, one, other in zip(
            self.weights, self.extract_features(first), self.extract_features(second), strict=True
        ):
            # (B, C, h, w) -> 1x1 convolution with learned channel weights -> (B, 1, h, w) -> spatial mean (B,)
            total = total + F.conv2d((one - other).square(), weight).mean((1, 2, 3))
        return total

    def extract_features(self, pictures: Tensor) -> list[Tensor]:
        """Return the compared activations, each `(B, C_l, h_l, w_l)` with unit norm along channels."""
        values, found = (pictures - self.shift) / self.scale, []
        for number, layer in enumerate(self.features):
            values = layer(values)
            if number in COMPARED:
                # The epsilon is outside the root, as in the reference implementation.
                found.append(values / (values.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found


def make_alexnet() -> nn.Sequential:
    """Return torchvision's `alexnet().features` without weights; its last max pooling is not needed."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def load_lpips(files: tuple[Path, Path], device: torch.device) -> Lpips:
    """Return LPIPS with AlexNet's and the linear weights from files, loaded with `weights_only=True`."""
    trunk, linear = (torch.load(path, map_location="cpu", weights_only=True) for path in files)
    return Lpips(trunk, linear).to(device)


def pairwise_distances(lpips: Lpips, pictures: Sequence[Image.Image]) -> Tensor:
    """Return the distances `(N, N)` of N images of equal size, on the CPU."""
    device = next(lpips.parameters()).device
    arrays = [np.asarray(picture.convert("RGB"), np.float32) / 127.5 - 1 for picture in pictures]
    tensors = [torch.from_numpy(array).permute(2, 0, 1)[None].to(device) for array in arrays]  # HWC -> (1, 3, H, W)
    distances = torch.zeros(len(tensors), len(tensors))
    for i in range(len(tensors)):
        for j in range(i):
            distances[i, j] = distances[j, i] = float(lpips(tensors[i], tensors[j]))
    return distances
