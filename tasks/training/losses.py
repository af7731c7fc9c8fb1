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
    """Return instance loss + `prior_loss_weight` x class loss (prior preservation, arXiv 2208.12242).

    The batch is `[instance | class]` along dim 0, so both halves share one forward. With weight 0 it holds
    instance images alone.

    Args:
        noise_pred: `(2B, C, h, w)`, any float dtype; the error is computed in float32, since squares of small
            errors underflow in fp16.
        target: noise, velocity or flow; same shape.
        prior_loss_weight: 0 keeps only the instance half.
        weights: `(2B,)`, one per example, applied to both halves.
        mask: `(2B, 1, h, w)` in [0, 1], the weight of each latent position in an example's mean.

    Raises:
        ValueError: the batch can't be split into two equal halves.

    """
    # (2B, C, h, w) -> one mean per example, (2B,): weights apply before examples are averaged.
    squares = (noise_pred.float() - target.float()).square()
    if mask is None:
        errors = squares.flatten(1).mean(1)
    else:
        # Normalized by the mask's own sum: a small subject counts as much as a large one.
        # `expand_as` repeats the mask over C channels, so that numerator and denominator count the same elements. The
        # clamp avoids 0 / 0 for an all-zero mask.
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
    """Return the min-SNR weight `(B,)` of each example (arXiv 2303.09556).

    The paper weights the error of the clean latents by min(SNR, gamma). In terms of the prediction's error this is
    min(SNR, gamma) / SNR for noise, min(SNR, gamma) / (SNR + 1) for velocity, and min(SNR, gamma) x sigma^2
    for rectified flow.
    """
    capped = noise.compute_snr(timesteps).clamp_max(snr_gamma)
    # 0 / 0 where the SNR is 0 (zero terminal SNR) and noise is predicted: its limit is 1.
    return torch.nan_to_num(capped * noise.x0_error_scale(timesteps), nan=1.0).float()
