"""Noise processes of training: timestep sampling, noising, prediction target, SNR.

Gaussian diffusion (Stable Diffusion 1.x, 2.x, XL) and rectified flow (3, Flux). A timestep is a function of one
uniform draw per sample, so that it depends on the sample alone.
"""

from typing import Any, ClassVar, Protocol

import diffusers
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tasks.diffusion.config import SAMPLERS
from tasks.errors import ConfigError


class NoiseProcess(Protocol):
    """Shapes: latents `(B, C, h, w)`, timesteps and everything per sample `(B,)`."""

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Map uniform draws `(B,)` in [0, 1) to timesteps."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return `noisy_latents`."""

    def compute_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the regression target of the denoiser, shaped as the latents."""

    def compute_snr(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio, a ratio of powers."""

    def x0_error_scale(self, timesteps: Tensor) -> Tensor:
        """Return the squared error of x0 (the clean latents) per squared error of the prediction."""


class GaussianDiffusion:
    """The process of Stable Diffusion 1.x, 2.x and XL, with noise or velocity as the target."""

    scheduler_class: ClassVar = DDPMScheduler

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self.scheduler = scheduler
        self.prediction_type = str(scheduler.config.prediction_type)
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ConfigError(f"prediction_type={self.prediction_type} of the base model's scheduler can't be trained")
        self.num_train_timesteps = int(scheduler.config.num_train_timesteps)
        # Signal power is alpha_bar, noise power 1 - alpha_bar.
        alphas = scheduler.alphas_cumprod
        self.snr = alphas / (1 - alphas)  # (num_train_timesteps,), float32; 0 at the end for zero terminal SNR

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Return int64 timesteps, uniform over the schedule."""
        # The clamp guards against a draw that rounds to 1.
        return (uniform * self.num_train_timesteps).long().clamp_max(self.num_train_timesteps - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return `noisy_latents`."""
        noisy: Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def compute_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noise or velocity (arXiv 2202.00512), as the scheduler's prediction type says."""
        if self.prediction_type == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        return noise

    def compute_snr(self, timesteps: Tensor) -> Tensor:
        """Return signal over noise power."""
        # Moved once; a no-op afterwards.
        self.snr = self.snr.to(timesteps.device)
        snr: Tensor = self.snr[timesteps]
        return snr

    def x0_error_scale(self, timesteps: Tensor) -> Tensor:
        """Return 1/SNR for noise, 1/(SNR + 1) for velocity."""
        # With a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar): x0 = (x_t - s eps) / a, and x0 = a x_t - s v.
        snr = self.compute_snr(timesteps)
        return 1 / (snr + 1) if self.prediction_type == "v_prediction" else 1 / snr


class RectifiedFlow:
    """Straight paths x_t = (1 - sigma) x0 + sigma noise (arXiv 2209.03003); timesteps are 1000 x sigma, float32.

    Timesteps are logit-normal as in Stable Diffusion 3 (arXiv 2403.03206, section 3.1).
    """

    scheduler_class: ClassVar = FlowMatchEulerDiscreteScheduler

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        self.scheduler = scheduler
        self.num_train_timesteps = int(scheduler.config.num_train_timesteps)
        # A resolution-dependent shift (Flux) is left out: the scheduler applies it in sampling only.
        self.timesteps = scheduler.timesteps.float()  # descending, with the scheduler's static shift applied

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Return float32 timesteps; their position in the schedule is logit-normal with mean 0 and scale 1."""
        # `ndtri` is infinite at 0 and 1.
        inside = uniform.double().clamp(1e-6, 1 - 1e-6)
        # The normal's quantile function turns a uniform draw into a normal one; float64 keeps the tails.
        position = torch.sigmoid(torch.special.ndtri(inside))
        index = (position * len(self.timesteps)).long().clamp_max(len(self.timesteps) - 1)
        timesteps: Tensor = self.timesteps.to(uniform.device)[index]
        return timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return `noisy_latents`, the point at sigma on the straight path."""
        sigma = self.compute_sigma(timesteps, latents)
        return (1 - sigma) * latents + sigma * noise

    def compute_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the flow noise - x0, the path's derivative by sigma."""
        return noise - latents

    def compute_snr(self, timesteps: Tensor) -> Tensor:
        """Return signal over noise power."""
        sigma = timesteps / self.num_train_timesteps
        return ((1 - sigma) / sigma) ** 2

    def x0_error_scale(self, timesteps: Tensor) -> Tensor:
        """Return sigma^2, since x0 = x_t - sigma x flow."""
        return (timesteps / self.num_train_timesteps) ** 2

    def compute_sigma(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Return sigma as `(B, 1, 1, 1)` in the dtype of `like`."""
        sigma = (timesteps / self.num_train_timesteps).to(like.dtype)
        return sigma.view(-1, *([1] * (like.ndim - 1)))


def make_sampler(name: str, noise: GaussianDiffusion | RectifiedFlow) -> Any:
    """Return a new scheduler for sampling, on the base model's schedule.

    The short names of `diffusion.sampler` mean the Euler scheduler of flow matching for rectified flow.

    Raises:
        ConfigError: the scheduler is for another noise process.

    """
    is_flow = isinstance(noise, RectifiedFlow)
    class_name = "FlowMatchEulerDiscreteScheduler" if is_flow and name in SAMPLERS else SAMPLERS.get(name, name)
    # diffusers lists which schedulers take each other's configuration; those of flow matching list none.
    known = {each.__name__ for each in noise.scheduler.compatibles}
    fits = class_name.startswith("FlowMatch") if is_flow else class_name in known
    if not fits or not hasattr(diffusers, class_name):
        kind = "rectified flow" if is_flow else "Gaussian diffusion"
        listed = ", ".join(sorted(known)) or "FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler"
        raise ConfigError(f"diffusion.sampler={name} doesn't suit {kind}; such schedulers are {listed}")
    return getattr(diffusers, class_name).from_config(noise.scheduler.config)
