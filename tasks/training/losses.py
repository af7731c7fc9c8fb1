"""The DreamBooth objective."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

# Shapes: B images per half, C latent channels, h x w latent side.


class PriorPreservationLoss(NamedTuple):
    """The loss and its halves, all scalars."""

    total: Tensor
    instance: Tensor
    prior: Tensor | None


def prior_preservation_loss(noise_pred: Tensor, target: Tensor, *, prior_loss_weight: float) -> PriorPreservationLoss:
    """Weigh the subject's error against drift of its class (arXiv 2208.12242).

    The batch is `[instance | class]` along dim 0, so both halves share one UNet pass; with weight 0
    it holds instances alone.

    Args:
        noise_pred: `(2B, C, h, w)`, compared in float32 (half precision underflows late in training).
        target: noise or velocity; same shape.
        prior_loss_weight: 0 keeps only the instance half.

    Raises:
        ValueError: the batch can't be split into two equal halves.

    """
    if prior_loss_weight == 0:
        instance = F.mse_loss(noise_pred.float(), target.float())
        return PriorPreservationLoss(instance, instance, None)
    if len(noise_pred) % 2:
        raise ValueError(f"a batch of {len(noise_pred)} has no two equal halves")
    predicted, wanted = noise_pred.float().chunk(2), target.float().chunk(2)
    instance = F.mse_loss(predicted[0], wanted[0])
    prior = F.mse_loss(predicted[1], wanted[1])
    return PriorPreservationLoss(instance + prior_loss_weight * prior, instance, prior)
