"""Distributions whose exact denoiser is known in closed form, and a stand-in for a UNet that has learned it."""

from types import SimpleNamespace
from typing import NamedTuple

import torch

from trainkit.diffusion.noise_schedule import is_flow, prediction_type_of

SMALLEST_ALPHA_BAR = 1e-12  # at a terminal SNR of zero


class PixelMixture(NamedTuple):
    """Pixels that are independent of each other: a mixture of Gaussians, each argument float64 (K,)."""

    weights: torch.Tensor
    means: torch.Tensor
    deviations: torch.Tensor

    @classmethod
    def of(cls, weights, means, deviations) -> "PixelMixture":
        return cls(*(torch.tensor(values, dtype=torch.float64) for values in (weights, means, deviations)))

    def best(self, noisy, alpha, sigma):
        """E[x_0 | x_t], the posterior mean."""
        variance = (alpha * self.deviations) ** 2 + sigma**2
        distance = noisy[..., None] - alpha * self.means
        posterior = torch.softmax(self.weights.log() - variance.log() / 2 - distance**2 / (2 * variance), dim=-1)
        return (posterior * (self.means + alpha * self.deviations**2 / variance * distance)).sum(-1)

    def shares_below(self, values, sigma):
        """The distribution function of pixels plus noise of deviation `sigma`."""
        scaled = (values[..., None] - self.means) / (self.deviations**2 + sigma**2).sqrt()
        return (self.weights * torch.special.ndtr(scaled)).sum(-1)

    def flow_to_data(self, noise, sigma):
        """Where the probability flow carries `noise`, standard normal, scaled to level `sigma` (None: infinite).

        In one dimension the flow keeps the order, so it is the map between quantiles.
        """
        if sigma is None:
            shares = torch.special.ndtr(noise)
        else:
            shares = self.shares_below(noise * (1 + sigma**2) ** 0.5, sigma)
        grid = torch.linspace(-2, 2, 20_001, dtype=torch.float64)
        below = self.shares_below(grid, 0.0)
        right = torch.searchsorted(below, shares).clamp(1, len(grid) - 1)
        gap = (below[right] - below[right - 1]).clamp(min=1e-300)
        return grid[right - 1] + ((shares - below[right - 1]) / gap).clamp(0, 1) * (grid[1] - grid[0])


class ExactUNet(torch.nn.Module):
    """What a UNet that has learned everything, but for an `error` (root mean square), predicts."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, noise_scheduler, best, shape, error=0.0):
        super().__init__()
        self.best, self.error = best, error
        self.flow = is_flow(noise_scheduler)
        self.num_train_timesteps = noise_scheduler.config.num_train_timesteps
        if not self.flow:
            alpha_bar = torch.cumprod(1 - noise_scheduler.betas.double(), 0).clamp(min=SMALLEST_ALPHA_BAR)
            self.log_sigmas = ((1 - alpha_bar) / alpha_bar).log() / 2
        self.prediction_type = prediction_type_of(noise_scheduler)
        self.config = SimpleNamespace(in_channels=shape[0], sample_size=shape[1:])

    def alpha_sigma(self, timestep):
        """The factors of image and noise; between two timesteps as diffusers' solvers do, linear in log sigma."""
        if self.flow:
            sigma = (timestep / self.num_train_timesteps).clamp(min=1e-6)
            return 1 - sigma, sigma
        low = timestep.long().clamp(max=self.num_train_timesteps - 2)
        ratio = torch.lerp(self.log_sigmas[low], self.log_sigmas[low + 1], timestep - low).exp()
        alpha = (1 + ratio**2) ** -0.5
        return alpha, alpha * ratio

    def forward(self, noisy, timestep):
        timestep = torch.as_tensor(timestep).double()
        alpha, sigma = self.alpha_sigma(timestep)
        noisy = noisy.double()
        clean = self.best(noisy, alpha, sigma)
        noise = (noisy - alpha * clean) / sigma
        exact = {
            "epsilon": noise,
            "sample": clean,
            "v_prediction": alpha * noise - sigma * clean,
            "flow_prediction": noise - clean,
        }[self.prediction_type]
        error = self.error * 2**0.5 * torch.sin(40 * noisy + 1.7 * float(timestep))
        return SimpleNamespace(sample=(exact + error).float())
