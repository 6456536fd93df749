"""What a few-step student is: a UNet over a variance-preserving schedule, with a scheduler that refuses more steps.

A student of N progressive steps is a diffusion model with N timesteps: its scheduler is a DDIMScheduler of N betas. A
consistency student keeps the teacher's timesteps and has an LCMScheduler. Both raise for more steps than the student
has, so the 1,000 steps that DDPMPipeline takes by default end in an error of diffusers, not in a bad image.
"""

# B batch, T timesteps of the teacher, N steps of the student, alpha_bar_t product of (1 - beta)

import copy

import torch
from diffusers import DDIMScheduler, LCMScheduler, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from torch import nn

from trainkit.diffusion.noise_schedule import NoiseScheduler, betas_of, is_flow

DISTILLED = "distilled"  # beta_schedule of a progressive student, whose betas are listed
NOISIEST = 80.0  # sigma / alpha of the first step of a consistency student, as in Karras et al. 2022
HALF_SKIPPED = 0.03  # sigma / alpha at which c_skip of a consistency student that predicts images is 1/2
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # of LCMScheduler


def is_few_step(scheduler: SchedulerMixin) -> bool:
    """Whether `scheduler` belongs to a few-step student."""
    return isinstance(scheduler, LCMScheduler) or scheduler.config.get("beta_schedule") == DISTILLED


def student_steps(scheduler: SchedulerMixin) -> int:
    """The most steps that the student of a few-step `scheduler` can take."""
    config = scheduler.config
    return config.original_inference_steps if isinstance(scheduler, LCMScheduler) else config.num_train_timesteps


def student_schedule(scheduler: NoiseScheduler) -> torch.Tensor:
    """alpha_bar (T,) float64 of the variance-preserving schedule of a student whose teacher has `scheduler`.

    That of the teacher, or, for flow matching, the one with the same noise relative to the image at timestep k = t T:
    alpha_bar = (1 - t)^2 / ((1 - t)^2 + t^2). Its first timestep has no noise.
    """
    if not is_flow(scheduler):
        return torch.cumprod(1 - scheduler.betas.double(), dim=0)
    time = (
        torch.arange(scheduler.config.num_train_timesteps, dtype=torch.float64) / scheduler.config.num_train_timesteps
    )
    return (1 - time) ** 2 / ((1 - time) ** 2 + time**2)


def step_timesteps(num_train_timesteps: int, num_steps: int) -> torch.Tensor:
    """The timesteps (N,) int64 of N steps, rising: the last one of each of N equal parts of the schedule.

    Those of N steps are every second one of 2 N steps.
    """
    ends = torch.arange(1, num_steps + 1) * num_train_timesteps
    return (2 * ends + num_steps).div(2 * num_steps, rounding_mode="floor") - 1


def progressive_scheduler(alphas_cumprod: torch.Tensor, num_steps: int, prediction_type: str) -> DDIMScheduler:
    """The scheduler of a student of N steps over the schedule alpha_bar (T,): DDIM over N timesteps."""
    kept = alphas_cumprod[step_timesteps(len(alphas_cumprod), num_steps)]
    return DDIMScheduler(
        num_train_timesteps=num_steps,
        beta_schedule=DISTILLED,
        trained_betas=betas_of(kept).tolist(),
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def consistency_schedule(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """alpha_bar (T',) of a consistency student: the timesteps of the teacher's (T,) with sigma / alpha up to 80.

    Cosine betas go on to 20,000. Training would hardly visit the timesteps above, and sampling would start there.
    """
    return alphas_cumprod[1 - alphas_cumprod <= NOISIEST**2 * alphas_cumprod]


def boundary_scaling(alphas_cumprod: torch.Tensor, prediction_type: str) -> float:
    """The timestep_scaling of a consistency student over alpha_bar (T',): see `skip_scalings`.

    If the student predicts images, half of its result is its input at the noise level `HALF_SKIPPED`. If it predicts
    velocities, it needs no boundary condition and has the default of diffusers.
    """
    if prediction_type != "sample":
        return TIMESTEP_SCALING
    levels = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    return SIGMA_DATA / max(1, int((levels < HALF_SKIPPED).sum()))


def skip_scalings(timesteps: torch.Tensor, timestep_scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """c_skip and c_out (B,) of LCMScheduler: a student's image is c_skip input + c_out prediction (B, C, H, W).

    At timestep 0 it is the input: the boundary condition of consistency models (Song et al. 2023, Eq. 5).
    """
    scaled = timesteps * timestep_scaling
    total = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


def consistency_scheduler(
    alphas_cumprod: torch.Tensor, num_steps: int, prediction_type: str, clip_sample: bool
) -> LCMScheduler:
    """The scheduler of a consistency student over alpha_bar (T',): multistep sampling of Song et al. 2023, alg. 1."""
    return LCMScheduler(
        num_train_timesteps=len(alphas_cumprod),
        trained_betas=betas_of(alphas_cumprod).tolist(),
        prediction_type=prediction_type,
        original_inference_steps=num_steps,
        timestep_scaling=boundary_scaling(alphas_cumprod, prediction_type),
        # Clipped, the prediction of an image would no longer cancel the noise in the part that is skipped.
        clip_sample=clip_sample and prediction_type != "sample",
    )


def with_time_table(unet: UNet2DModel, timesteps: torch.Tensor) -> UNet2DModel:
    """A UNet that shares the weights of `unet` and numbers `timesteps` (N,) from 0 to N - 1.

    The sinusoidal features of the timesteps become a table, which a stock UNet2DModel has as
    time_embedding_type="learned". `unet` is not changed.
    """
    with torch.no_grad():
        features = unet.time_proj(timesteps.to(unet.device))
    table = nn.Embedding.from_pretrained(features.to(unet.dtype), freeze=True)
    numbered = copy.copy(unet)
    numbered._modules = unet._modules | {"time_proj": table}
    numbered.register_to_config(time_embedding_type="learned", num_train_timesteps=len(timesteps))
    numbered.__dict__.pop("forward", None)  # Accelerate's is bound to `unet`
    return numbered


def without_time_table(unet: UNet2DModel, teacher: UNet2DModel) -> UNet2DModel:
    """`unet`, a UNet with a time table, with the sinusoidal features of `teacher` again, in place."""
    unet.time_proj = copy.deepcopy(teacher.time_proj)
    config = teacher.config
    unet.register_to_config(
        time_embedding_type=config.time_embedding_type, num_train_timesteps=config.get("num_train_timesteps")
    )
    return unet


def takes_time_table(unet: UNet2DModel | UNet2DConditionModel) -> bool:
    """Whether a stock UNet of this class can have a time table."""
    return isinstance(unet, UNet2DModel)
