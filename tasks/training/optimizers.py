"""Optimizers by name, and the backend settings of torch."""

from pathlib import Path
from typing import Any

import torch

from tasks.diffusion.adapter import DiffusionModel
from tasks.errors import ConfigError
from tasks.training.config import TrainingConfig


def make_optimizer(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the configured optimizer. Raises ConfigError where its package is missing."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)  # fused: reads `found_inf`, so skipping needs no synchronization
    if config.optimizer == "prodigy":
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise ConfigError(
                "training.optimizer=prodigy needs the package prodigyopt; pip install prodigyopt"
            ) from error
        # Prodigy (arXiv 2306.06101) estimates one step size for all groups and expects equal `lr`, usually 1.
        fastest = max(group["lr"] for group in groups)
        groups = [{**group, "lr": 1.0, "base_lr": 1.0, "relative_rate": group["lr"] / fastest} for group in groups]
        # `safeguard_warmup` takes the learning rate, near 0 in warm-up, out of the denominator of the estimate.
        optimizer: torch.optim.Optimizer = Prodigy(groups, safeguard_warmup=True, use_bias_correction=True)
        return keep_relative_rates(optimizer)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "training.optimizer=adamw8bit needs the package bitsandbytes; pip install bitsandbytes"
        ) from error
    eight_bit: torch.optim.Optimizer = AdamW8bit(groups)
    return eight_bit


def keep_relative_rates(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Scale each group's update by its `relative_rate`, as a smaller learning rate would."""
    before: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def save_parameters(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Groups at the full rate need no copy.
        before.clear()
        for group in optimizer.param_groups:
            if group["relative_rate"] != 1.0:
                before.extend((p, p.detach().clone(), group["relative_rate"]) for p in group["params"])

    @torch.no_grad()
    def rescale_update(*_: Any) -> None:
        for parameter, start, share in before:
            # start + relative_rate * (new - start): scales the weight decay as well, as a smaller rate would.
            parameter.copy_(torch.lerp(start, parameter, share))
        before.clear()

    optimizer.register_step_pre_hook(save_parameters)
    optimizer.register_step_post_hook(rescale_update)
    return optimizer


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer reads `found_inf` on the device, so that skipping a step needs no synchronization."""
    return isinstance(optimizer, torch.optim.AdamW)


def set_up_kernels(model: DiffusionModel, config: TrainingConfig) -> None:
    """Set TF32, memory format and compilation. Raises ConfigError where torch can't compile."""
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if config.channels_last and model.denoiser_name == "unet":
        model.denoiser.to(memory_format=torch.channels_last)
    if config.compile:
        check_compiler(model.device)
        # Regional compilation: one graph serves all blocks of a kind, so start-up takes a minute instead of many.
        model.denoiser.compile_repeated_blocks()


def check_compiler(device: torch.device, folder: Path = Path(torch.__file__).parent) -> None:
    """Refuse `compile` on a CPU where torch's path holds a space, which Inductor doesn't quote for g++."""
    if device.type == "cpu" and " " in str(folder):
        raise ConfigError(
            f"training.compile: torch can't compile for CPUs from a folder with a space in its name ({folder}); "
            "make the environment elsewhere, or set training.compile=false"
        )
