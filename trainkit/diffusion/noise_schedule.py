"""The noise schedule of training, as a stock scheduler of diffusers that is saved with the model.

x_t = alpha_t image + sigma_t noise. Variance preserving (DDPMScheduler): alpha^2 = alpha_bar, sigma^2 = 1 - alpha_bar,
at integer timesteps. Flow matching (FlowMatchEulerDiscreteScheduler): alpha = 1 - t / T, sigma = t / T, at any t in
[0, T].
"""

# B batch, T training timesteps, SNR = alpha^2 / sigma^2, alpha_bar_t product of (1 - beta)

from typing import TypeAlias

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from trainkit.options.script import TrainingOptions

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
DEFAULT_PREDICTION_TYPE = "sample"
DEFAULT_BETA_SCHEDULE = "squaredcos_cap_v2"
PRETRAINED_SCHEDULE = "pretrained"  # the betas that a saved pipeline was trained over
# Where a saved pipeline may store them. Our own `scheduler/` is a solver, whose last betas differ.
TRAINING_SCHEDULERS = ("schedulers/ddpm", "schedulers/flow_euler", "scheduler", None)
DDPM_SETTINGS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "clip_sample",
)  # fmt: skip
NoiseScheduler: TypeAlias = DDPMScheduler | FlowMatchEulerDiscreteScheduler


def build_noise_scheduler(options: TrainingOptions, clip_sample: bool = True) -> NoiseScheduler:
    """The scheduler that the options describe: noise schedule, number of timesteps, prediction type.

    Beta schedules: linear (Ho et al. 2020, section 4), scaled_linear (Rombach et al. 2022), squaredcos_cap_v2
    (Nichol & Dhariwal 2021, Eq. 17), sigmoid, or pretrained: that of --pretrained_model_name_or_path. `--noise_shift`
    and `--rescale_betas_zero_snr` then change the betas, in this order. Flow matching has only a shift.
    `clip_sample` says whether samplers may clip to [-1, 1]: not latents, which have no range. Flow solvers never clip.
    """
    if options.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=options.ddpm_num_steps, shift=float(options.noise_shift)
        )
    settings = {
        "num_train_timesteps": options.ddpm_num_steps,
        "beta_schedule": options.ddpm_beta_schedule or DEFAULT_BETA_SCHEDULE,
        "prediction_type": options.prediction_type or DEFAULT_PREDICTION_TYPE,
        "clip_sample": clip_sample,
    }
    if options.ddpm_beta_schedule == PRETRAINED_SCHEDULE:
        name = options.pretrained_model_name_or_path
        plain = None if name is None else saved_noise_scheduler(name)
        assert plain is not None  # resolve_objective refuses a model without its schedule
        settings |= {"beta_schedule": plain.config.beta_schedule}
    else:
        plain = DDPMScheduler(**settings)
    if options.noise_shift == 1 and not options.rescale_betas_zero_snr:
        return plain
    alphas_cumprod = torch.cumprod(1 - plain.betas.double(), dim=0)
    if options.noise_shift != 1:
        alphas_cumprod = shifted(alphas_cumprod, options.noise_shift)
    if options.rescale_betas_zero_snr:
        alphas_cumprod = zero_terminal_snr(alphas_cumprod)
    return DDPMScheduler(trained_betas=betas_of(alphas_cumprod).tolist(), **settings)


def saved_noise_scheduler(name: str) -> NoiseScheduler | None:
    """The noise schedule of training of the saved pipeline `name` (a folder or Hub id); None if it is not stored."""
    for subfolder in TRAINING_SCHEDULERS:
        try:
            config = DDPMScheduler.load_config(name, subfolder=subfolder)
        except (OSError, ValueError):
            continue
        if config.get("prediction_type") == "flow_prediction" or str(config.get("_class_name")).startswith(
            "FlowMatch"
        ):
            shift = config.get("shift", config.get("flow_shift", 1.0))
            return FlowMatchEulerDiscreteScheduler(config.get("num_train_timesteps", 1000), shift=float(shift))
        if "beta_schedule" in config:
            try:
                return DDPMScheduler(**{key: config[key] for key in DDPM_SETTINGS if key in config})
            except NotImplementedError:  # a schedule unknown to the installed diffusers
                return None
    return None


def shifted(alphas_cumprod: torch.Tensor, shift: float) -> torch.Tensor:
    """alpha_bar (T,) of the schedule with `shift` times as much noise relative to the image: SNR / shift^2.

    log SNR' = log SNR + 2 log(64 / side) for shift = side / 64 (Hoogeboom et al. 2023, section 3.1).
    """
    return alphas_cumprod / (alphas_cumprod + shift**2 * (1 - alphas_cumprod))


def zero_terminal_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """alpha_bar (T,) rescaled to end at 0, with the first one unchanged (Lin et al. 2023, algorithm 1)."""
    roots = alphas_cumprod.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * first / (first - last)).square()


def betas_of(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Betas (T,) whose products are `alphas_cumprod`."""
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / before


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether `scheduler` is for flow matching, whose timesteps are continuous."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def prediction_type_of(scheduler: NoiseScheduler) -> str:
    """What a network trained with `scheduler` predicts, by its name in diffusers."""
    return "flow_prediction" if is_flow(scheduler) else scheduler.config.prediction_type


def alpha_sigma(scheduler: NoiseScheduler, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma, the factors of image and noise, at `timesteps` (B,): two float32 (B,)."""
    if is_flow(scheduler):
        sigma = timesteps.float() / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def add_noise(
    scheduler: NoiseScheduler, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Noisy images (B, C, H, W) float32 at `timesteps` (B,).

    Flow matching mixes (1 - t) image + t noise (Liu et al. 2023, Eq. 1; Lipman et al. 2023).
    """
    if not is_flow(scheduler):
        return scheduler.add_noise(images, noise, timesteps)
    alpha, sigma = (factor[:, None, None, None] for factor in alpha_sigma(scheduler, timesteps))
    return alpha * images + sigma * noise


def uniform_timesteps(uniforms: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
    """Timesteps (B,) int64 in [0, num_train_timesteps) from `uniforms` (B,) in [0, 1)."""
    return (uniforms * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)


def signal_to_noise(scheduler: DDPMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """alpha_bar / (1 - alpha_bar) at `timesteps` (B,), float32 (B,). (Kingma et al. 2021, Eq. 3)"""
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return alphas_cumprod / (1 - alphas_cumprod)
