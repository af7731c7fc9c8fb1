"""Noise processes: targets, ratios and weights against their definitions."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from tasks.diffusion.noise_schedulers import GaussianDiffusion, RectifiedFlow
from tasks.training.losses import min_snr_weights
from tests.support.numerics import assert_same_up_to_rounding

TIMESTEPS = torch.tensor([5, 300, 950])


def gaussian(prediction_type: str) -> GaussianDiffusion:
    return GaussianDiffusion(DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type))


def flow(**options: object) -> RectifiedFlow:
    return RectifiedFlow(FlowMatchEulerDiscreteScheduler(**options))


def test_min_snr_weights_match_the_paper() -> None:
    snr = gaussian("epsilon").compute_snr(TIMESTEPS)
    assert snr[0] > 5 > snr[2]
    noise = min_snr_weights(gaussian("epsilon"), TIMESTEPS, snr_gamma=5.0)
    velocity = min_snr_weights(gaussian("v_prediction"), TIMESTEPS, snr_gamma=5.0)
    assert_same_up_to_rounding(noise, snr.clamp_max(5) / snr, terms=2)
    assert_same_up_to_rounding(velocity, snr.clamp_max(5) / (snr + 1), terms=2)


@pytest.mark.parametrize("process", [gaussian("epsilon"), gaussian("v_prediction"), flow(shift=3.0)])
def test_min_snr_weights_scale_the_x0_error_by_the_clamped_snr(
    process: GaussianDiffusion | RectifiedFlow,
) -> None:
    torch.manual_seed(0)
    timesteps = process.sample_timesteps(torch.tensor([0.2, 0.5, 0.8]))
    latents, noise = torch.randn(3, 4, 8, 8).double(), torch.randn(3, 4, 8, 8).double()
    noisy, target = process.add_noise(latents, noise, timesteps), process.compute_target(latents, noise, timesteps)
    wrong = target + 0.01 * torch.randn_like(target)
    snr = process.compute_snr(timesteps).double().view(-1, 1, 1, 1)
    if isinstance(process, RectifiedFlow):
        clean = noisy - wrong * (timesteps / 1000).view(-1, 1, 1, 1)
    elif process.prediction_type == "epsilon":
        clean = (noisy - wrong * (1 / (1 + snr)).sqrt()) / (snr / (1 + snr)).sqrt()
    else:
        clean = noisy * (snr / (1 + snr)).sqrt() - wrong * (1 / (1 + snr)).sqrt()
    errors = (clean - latents).square().flatten(1).mean(1) * snr.flatten().clamp_max(5)
    weighted = (wrong - target).square().flatten(1).mean(1) * min_snr_weights(process, timesteps, snr_gamma=5.0)
    # The schedule's own numbers are float32, and an SNR near its end cancels three of their seven digits.
    torch.testing.assert_close(weighted, errors, rtol=1e-3, atol=1e-9)


def test_flow_add_noise_matches_the_diffusers_scheduler() -> None:
    process = flow(shift=3.0)
    timesteps = process.sample_timesteps(torch.tensor([0.1, 0.6]))
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    theirs = process.scheduler.scale_noise(latents, timesteps, noise)
    assert_same_up_to_rounding(process.add_noise(latents, noise, timesteps), theirs, terms=2)


def test_flow_timesteps_follow_the_logit_normal_density() -> None:
    process = flow()
    sigmas = process.sample_timesteps(torch.linspace(0.0005, 0.9995, 20_000)) / 1000
    logits = torch.logit(sigmas.double().clamp(1e-4, 1 - 1e-4))
    assert logits.mean() == pytest.approx(0.0, abs=0.02)
    assert logits.std() == pytest.approx(1.0, abs=0.02)


def test_gaussian_timesteps_are_uniform() -> None:
    timesteps = gaussian("epsilon").sample_timesteps(torch.linspace(0, 1, 1001)[:-1] + 0.0005)
    assert torch.equal(timesteps, torch.arange(1000))
