"""The noise schedule of training, as a stock DDPMScheduler that is saved with the model."""

import torch
from diffusers import DDPMScheduler


def build_noise_scheduler(options) -> DDPMScheduler:
    """The DDPMScheduler (Ho et al. 2020) that `ObjectiveOptions` describe: betas, number of steps, prediction type.

    Beta schedules: linear (Ho et al. 2020, section 4), scaled_linear (Rombach et al. 2022), squaredcos_cap_v2
    (Nichol & Dhariwal 2021, Eq. 17), sigmoid.
    """
    return DDPMScheduler(
        num_train_timesteps=options.ddpm_num_steps,
        beta_schedule=options.ddpm_beta_schedule,
        prediction_type=options.prediction_type,
    )


def uniform_timesteps(uniforms: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
    """Timesteps (B,) int64 in [0, num_train_timesteps) from `uniforms` (B,) in [0, 1)."""
    return (uniforms * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)


def signal_to_noise(scheduler: DDPMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """alpha_bar / (1 - alpha_bar) at `timesteps` (B,), float32 (B,). (Kingma et al. 2021, Eq. 3)"""
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return alphas_cumprod / (1 - alphas_cumprod)
