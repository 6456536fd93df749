"""The noise of the images: one CPU generator per image, so that it is the same on any device and in any batch.

It is drawn in the order in which the pipelines of diffusers draw it, so it may be drawn ahead in a thread.
"""

# B batch, C channels, H/W pixels or latents

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor


class Batch(NamedTuple):
    """Images that are generated together, and where their chains start."""

    numbers: Sequence[int]  # of the images
    seeds: Sequence[int]
    generators: list[torch.Generator]  # after the draw of `start`
    start: torch.Tensor  # (B, C, H, W) standard normal


# A `Batch`, then one entry per scheduler step: its noise (B, C, H, W), None if the scheduler draws it or needs none.
Noise: TypeAlias = Batch | torch.Tensor | None


def draw(
    parts: Iterable[tuple[Sequence[int], Sequence[int]]],
    shape: Sequence[int],
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    pin_memory: bool = False,
) -> Iterator[Noise]:
    """Yield the noise of each part (numbers, seeds) of images (C, H, W) `shape`: a `Batch`, then an entry per step.

    `pin_memory` is for copies to a GPU that do not wait.
    """
    scheduler.set_timesteps(num_inference_steps)
    num_calls, in_steps = len(scheduler.timesteps), accepts_noise(scheduler)
    return _draw(parts, tuple(shape), num_calls, in_steps, pin_memory)


def _draw(parts, shape: tuple[int, ...], num_calls: int, in_steps: bool, pin_memory: bool) -> Iterator[Noise]:
    for numbers, seeds in parts:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        size = (len(seeds), *shape)
        yield Batch(numbers, seeds, generators, _normal(size, generators, pin_memory))
        for _ in range(num_calls):
            yield _normal(size, generators, pin_memory) if in_steps else None


def accepts_noise(scheduler: SchedulerMixin) -> bool:
    """Whether `step` draws noise of the image's shape once per call, and takes it as `variance_noise` instead."""
    return isinstance(scheduler, DPMSolverMultistepScheduler) and scheduler.config.algorithm_type.startswith("sde-")


def _normal(size: tuple[int, ...], generators: list[torch.Generator], pin_memory: bool) -> torch.Tensor:
    noise = randn_tensor(size, generator=generators, device=torch.device("cpu"), dtype=torch.float32)
    return noise.pin_memory() if pin_memory else noise
