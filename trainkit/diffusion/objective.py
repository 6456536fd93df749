"""What the network is asked to predict, and how its error is weighed.

B batch, C channels, H/W pixels; images in [-1, 1].
"""

import torch
from diffusers import DDPMScheduler

from trainkit.diffusion.noise_schedule import signal_to_noise


def prediction_target(
    scheduler: DDPMScheduler, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the scheduler's `prediction_type` stands for, (B, C, H, W): noise, image, or velocity.

    The velocity is sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) image (Salimans & Ho 2022, appendix D).
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return images
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(images, noise, timesteps)
    raise ValueError(f"unknown prediction_type {prediction_type}")


def denoising_errors(
    scheduler: DDPMScheduler,
    prediction: torch.Tensor,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """Squared error of each `prediction` (B, C, H, W) against its target, mean over pixels, weighed: (B,) float32."""
    target = prediction_target(scheduler, images, noise, timesteps)
    errors = (prediction.float() - target).square().flatten(1).mean(1)
    return loss_weights(scheduler, timesteps, snr_gamma) * errors


def loss_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, snr_gamma: float | None) -> torch.Tensor:
    """Weights (B,) float32 of the squared error at `timesteps`.

    Without `snr_gamma`, the error of the noise (Ho et al. 2020, Eq. 14) for epsilon, and its equal for sample, which
    is the signal-to-noise ratio as in diffusers' example; the velocity is weighed evenly (SNR + 1 for the image).
    With it, min(SNR, gamma) in terms of the image (Hang et al. 2023, section 3.4), turned to the predicted quantity.
    """
    prediction_type = scheduler.config.prediction_type
    if snr_gamma is None and prediction_type != "sample":
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = signal_to_noise(scheduler, timesteps)
    weight_of_image = snr if snr_gamma is None else snr.clamp(max=snr_gamma)
    # ||image - image'||^2 = ||eps - eps'||^2 / SNR = ||v - v'||^2 / (SNR + 1)
    return weight_of_image / {"sample": 1, "epsilon": snr, "v_prediction": snr + 1}[prediction_type]
