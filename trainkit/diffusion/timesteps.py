"""Which noise levels are trained on: each image's timestep comes from its uniform number through an inverse CDF.

The uniforms are a pure function of (seed, step, row), and so are the timesteps. Evenly spread uniforms give evenly
spread quantiles.
"""

import torch

from trainkit.data.loading.transfer import to_device
from trainkit.diffusion.noise_schedule import NoiseScheduler, is_flow, uniform_timesteps
from trainkit.options.model import ObjectiveOptions


def draw_timesteps(
    options: ObjectiveOptions, scheduler: NoiseScheduler, uniforms: torch.Tensor, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Timesteps (B,) to train on from `uniforms` (B,) float64 in [0, 1), distributed as `--timestep_sampling` says.

    They are computed on the host, in float64, and are the same on every `device` that they are copied to. int64 in
    [0, T) for DDPMScheduler, float32 in [0, T) for flow matching, where `--noise_shift` s maps t to
    s t / (1 + (s - 1) t) (Esser et al. 2024, Eq. 23).

    uniform        all timesteps equally often
    logit_normal   t / T = sigmoid(mean + std z), z standard normal (Esser et al. 2024, Eq. 19)
    edm_lognormal  ln(sigma / alpha) = P_mean + P_std z (Karras et al. 2022, table 1), for any schedule or shift,
                   truncated to the noise levels of a DDPMScheduler and rounded to the nearest of them
    """
    return to_device(_on_host(options, scheduler, uniforms), torch.device(device))


def _on_host(options: ObjectiveOptions, scheduler: NoiseScheduler, uniforms: torch.Tensor) -> torch.Tensor:
    num_train_timesteps, flow = scheduler.config.num_train_timesteps, is_flow(scheduler)
    if options.timestep_sampling == "edm_lognormal":
        if flow:
            log_sigma = options.edm_p_mean + options.edm_p_std * torch.special.ndtri(uniforms)
            return _below(torch.sigmoid(log_sigma), num_train_timesteps)  # sigma / alpha = t / (1 - t)
        return _nearest_log_sigma(scheduler, uniforms, options.edm_p_mean, options.edm_p_std)
    if options.timestep_sampling == "logit_normal":
        uniforms = torch.sigmoid(options.logit_mean + options.logit_std * torch.special.ndtri(uniforms))
    if not flow:
        return uniform_timesteps(uniforms, num_train_timesteps)
    shift = options.noise_shift
    return _below(shift * uniforms / (1 + (shift - 1) * uniforms), num_train_timesteps)


def _below(times: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
    """`times` in [0, 1] as float32 timesteps below T: rounding must not move one into validation's next bin."""
    end = torch.nextafter(torch.tensor(float(num_train_timesteps)), torch.tensor(0.0)).item()
    return (times * num_train_timesteps).float().clamp(max=end)


def _nearest_log_sigma(scheduler: NoiseScheduler, uniforms: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    # `scheduler.alphas_cumprod` itself is on the device, where `add_noise` puts it: the host would wait for it
    alphas_cumprod = torch.cumprod(scheduler.alphas, dim=0).to(uniforms.dtype)
    levels = ((1 - alphas_cumprod) / alphas_cumprod).log() / 2  # (T,), rising
    # quantiles of the ends: a truncated normal distribution uses only the uniforms between them
    lowest, highest = (torch.special.ndtr((levels[end] - mean) / std) for end in (0, -1))
    log_sigma = mean + std * torch.special.ndtri(lowest + uniforms * (highest - lowest))
    return torch.bucketize(log_sigma, (levels[1:] + levels[:-1]) / 2)
