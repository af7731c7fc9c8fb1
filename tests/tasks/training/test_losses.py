"""The objective."""

import pytest
import torch

from tasks.training.losses import prior_preservation_loss
from tests.support.numerics import assert_same_up_to_rounding


def test_instance_and_prior_losses_are_weighted_separately() -> None:
    predicted = torch.tensor([1.0, 1.0, 3.0, 3.0]).view(4, 1, 1, 1)
    loss = prior_preservation_loss(predicted, torch.zeros(4, 1, 1, 1), prior_loss_weight=0.5)
    assert loss.instance == 1.0
    assert loss.prior == 9.0
    assert loss.total == 1.0 + 0.5 * 9.0


def test_a_zero_prior_loss_weight_treats_the_whole_batch_as_instances() -> None:
    predicted = torch.tensor([1.0, 3.0, 2.0]).view(3, 1, 1, 1)
    loss = prior_preservation_loss(predicted, torch.zeros(3, 1, 1, 1), prior_loss_weight=0.0)
    assert loss.prior is None
    assert loss.total == pytest.approx((1 + 9 + 4) / 3)


def test_an_odd_batch_size_is_rejected_with_prior_preservation() -> None:
    with pytest.raises(ValueError, match="no two equal halves"):
        prior_preservation_loss(torch.zeros(3, 1), torch.zeros(3, 1), prior_loss_weight=1.0)


def test_the_loss_of_half_precision_predictions_is_computed_in_float32() -> None:
    predicted = torch.full((2, 1, 1, 1), 1e-4, dtype=torch.bfloat16)
    loss = prior_preservation_loss(predicted, torch.zeros_like(predicted), prior_loss_weight=1.0)
    assert loss.total.dtype == torch.float32
    assert loss.total > 0


def test_masked_out_pixels_do_not_contribute_to_the_loss() -> None:
    predicted, target = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :4] = 1
    loss = prior_preservation_loss(predicted, target, prior_loss_weight=0.0, mask=mask)
    assert_same_up_to_rounding(loss.total, (predicted - target)[:, :, :4].square().mean(), terms=256)
    other = predicted.clone()
    other[:, :, 4:] += 100
    assert prior_preservation_loss(other, target, prior_loss_weight=0.0, mask=mask).total == loss.total
    whole = prior_preservation_loss(predicted, target, prior_loss_weight=0.0, mask=torch.ones(2, 1, 8, 8))
    assert_same_up_to_rounding(whole.total, (predicted - target).square().mean(), terms=512)
