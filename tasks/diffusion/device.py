"""Resolve the configured device."""

from typing import TYPE_CHECKING

from tasks.diffusion.config import DiffusionConfig
from tasks.errors import ConfigError

if TYPE_CHECKING:
    import torch


def choose_device(config: DiffusionConfig) -> "torch.device":
    """Return the device to compute on. Raises ConfigError for cuda without a GPU."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("diffusion.device=cuda, but torch sees no GPU; set diffusion.device=auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def count_gpus() -> int:
    """Return the number of visible GPUs, at least 1: the CPU counts as one device."""
    import torch

    return max(1, torch.cuda.device_count())
