"""Noise in training: how much, what the denoiser should predict, and how much an error weighs.

Two processes: Gaussian diffusion (Stable Diffusion 1.x, 2.x, XL) and rectified flow (3, Flux).
Timesteps come from one uniform draw per sample, so that they are a function of the sample alone.
"""

from typing import ClassVar, Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tasks.errors import ConfigError


class NoiseProcess(Protocol):
    """Shapes: latents `(B, C, h, w)`, timesteps and everything per sample `(B,)`."""

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Map uniform draws in [0, 1) to timesteps."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return `noisy_latents`."""

    def compute_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the prediction should be."""

    def compute_snr(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio (of powers)."""

    def x0_error_scale(self, timesteps: Tensor) -> Tensor:
        """Return the squared error of the clean latents that a squared error of 1 in the prediction causes."""


class GaussianDiffusion:
    """The schedule of Stable Diffusion 1.x, 2.x and XL: noise or velocity is predicted."""

    scheduler_class: ClassVar = DDPMScheduler

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self.scheduler = scheduler
        self.prediction_type = str(scheduler.config.prediction_type)
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ConfigError(f"prediction_type={self.prediction_type} of the base model's scheduler can't be trained")
        self.num_train_timesteps = int(scheduler.config.num_train_timesteps)
        alphas = scheduler.alphas_cumprod
        self.snr = alphas / (1 - alphas)

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Return every timestep with equal probability."""
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
        self.snr = self.snr.to(timesteps.device)
        snr: Tensor = self.snr[timesteps]
        return snr

    def x0_error_scale(self, timesteps: Tensor) -> Tensor:
        """Return 1/SNR for noise, 1/(SNR + 1) for velocity."""
        snr = self.compute_snr(timesteps)
        return 1 / (snr + 1) if self.prediction_type == "v_prediction" else 1 / snr


class RectifiedFlow:
    """Straight paths between latents and noise (arXiv 2209.03003); timesteps are 1000 x sigma.

    Draws follow the logit-normal density of Stable Diffusion 3 (arXiv 2403.03206, section 3.1).
    """

    scheduler_class: ClassVar = FlowMatchEulerDiscreteScheduler

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        self.scheduler = scheduler
        self.num_train_timesteps = int(scheduler.config.num_train_timesteps)
        self.timesteps = scheduler.timesteps.float()  # falling, shifted as the model was trained

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Return timesteps of logit-normal density, mean 0 and deviation 1."""
        inside = uniform.double().clamp(1e-6, 1 - 1e-6)
        position = torch.sigmoid(torch.special.ndtri(inside))
        index = (position * len(self.timesteps)).long().clamp_max(len(self.timesteps) - 1)
        timesteps: Tensor = self.timesteps.to(uniform.device)[index]
        return timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the point of the straight path."""
        sigma = self.compute_sigma(timesteps, latents)
        return (1 - sigma) * latents + sigma * noise

    def compute_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the path's direction."""
        return noise - latents

    def compute_snr(self, timesteps: Tensor) -> Tensor:
        """Return signal over noise power."""
        sigma = timesteps / self.num_train_timesteps
        return ((1 - sigma) / sigma) ** 2

    def x0_error_scale(self, timesteps: Tensor) -> Tensor:
        """Return sigma squared: the clean latents are noisy latents less sigma x direction."""
        return (timesteps / self.num_train_timesteps) ** 2

    def compute_sigma(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Return sigma, ready to multiply latents."""
        sigma = (timesteps / self.num_train_timesteps).to(like.dtype)
        return sigma.view(-1, *([1] * (like.ndim - 1)))
