"""The DreamBooth objective."""

from typing import NamedTuple

import torch
from torch import Tensor

from tasks.diffusion.noise_schedulers import NoiseProcess

# Shapes: B images per half, C latent channels, h x w latent side.


class PriorPreservationLoss(NamedTuple):
    """The loss and its halves, all scalars."""

    total: Tensor
    instance: Tensor
    prior: Tensor | None


def prior_preservation_loss(
    noise_pred: Tensor,
    target: Tensor,
    *,
    prior_loss_weight: float,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> PriorPreservationLoss:
    """Weigh the subject's error against drift of its class (arXiv 2208.12242).

    The batch is `[instance | class]` along dim 0, so both halves share one forward; with weight 0
    it holds instances alone.

    Args:
        noise_pred: `(2B, C, h, w)`, compared in float32 (half precision underflows late in training).
        target: noise, velocity or flow; same shape.
        prior_loss_weight: 0 keeps only the instance half.
        weights: `(2B,)`, one per example, for both halves alike.
        mask: `(2B, 1, h, w)`, what each place counts; errors are means by it.

    Raises:
        ValueError: the batch can't be split into two equal halves.

    """
    squares = (noise_pred.float() - target.float()).square()
    if mask is None:
        errors = squares.flatten(1).mean(1)
    else:
        errors = (squares * mask).flatten(1).sum(1) / mask.expand_as(squares).flatten(1).sum(1).clamp_min(1e-6)
    if weights is not None:
        errors = errors * weights
    if prior_loss_weight == 0:
        instance = errors.mean()
        return PriorPreservationLoss(instance, instance, None)
    if len(errors) % 2:
        raise ValueError(f"a batch of {len(errors)} has no two equal halves")
    instance, prior = (half.mean() for half in errors.chunk(2))
    return PriorPreservationLoss(instance + prior_loss_weight * prior, instance, prior)


def min_snr_weights(noise: NoiseProcess, timesteps: Tensor, *, snr_gamma: float) -> Tensor:
    """Return one weight `(B,)` per example that caps the SNR at `snr_gamma` (arXiv 2303.09556).

    The paper weighs errors of the clean latents by min(SNR, gamma); an error of the prediction counts
    by the share of clean error that it causes: min(SNR, gamma) / SNR for noise, / (SNR + 1) for
    velocity, x sigma squared for rectified flow.
    """
    capped = noise.compute_snr(timesteps).clamp_max(snr_gamma)
    return torch.nan_to_num(capped * noise.x0_error_scale(timesteps), nan=1.0).float()
