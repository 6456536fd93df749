"""The solver loop: from noise to the model's output, by any scheduler of diffusers."""

# B batch, C channels, H/W pixels or latents

import inspect
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from diffusers import SchedulerMixin

# (number of the call, timestep, scaled sample (B, C, H, W)) -> prediction (B, C, H, W) float32
Predict: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def solve(
    scheduler: SchedulerMixin,
    predict: Predict,
    start: torch.Tensor,
    generators: list[torch.Generator],
    step_noise: Iterable[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Run the scheduler from `start` (B, C, H, W), standard normal noise on the device; returns the last sample.

    The scheduler's timesteps must be set. One entry of `step_noise` is taken per timestep: the noise that `step` would
    draw from `generators` (`noise.accepts_noise`), or None. Without it `step` draws its noise itself. The images are
    bit for bit those of DDPMPipeline and ConditionalPipeline.
    """
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if "generator" in accepted else {}
    scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    noises = None if step_noise is None else iter(step_noise)
    sample = start * getattr(scheduler, "init_noise_sigma", 1.0)
    for index, timestep in enumerate(scheduler.timesteps):
        noise = None if noises is None else next(noises)
        given = {} if noise is None else {"variance_noise": noise.to(sample.device, non_blocking=True)}
        prediction = predict(index, timestep, scale_model_input(sample, timestep))
        sample = scheduler.step(prediction, timestep, sample, **extra, **given, return_dict=False)[0]
    return sample
