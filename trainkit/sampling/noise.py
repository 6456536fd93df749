"""The noise of the images: one CPU generator per image, so that it is the same on any device and in any batch.

It is drawn in the order in which the pipelines of diffusers draw it, so it may be drawn ahead in a thread.
"""

# B batch, C channels, H/W pixels or latents

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

STAGE_SEEDS = 1_000_000_000  # what the seeds of an upsampler are above those of the model before it


class Batch(NamedTuple):
    """Images that are generated together, and where their chains start."""

    numbers: Sequence[int]  # of the images
    seeds: Sequence[int]
    generators: list[torch.Generator]  # after the draw of `start`
    start: torch.Tensor  # (B, C, H, W) standard normal
    stage: int = 0  # 1 for the first upsampler of a cascade, 2 for the next


# A `Batch`, then one entry per scheduler step: its noise (B, C, H, W), None if the scheduler draws it or needs none.
Noise: TypeAlias = Batch | torch.Tensor | None


class Chain(NamedTuple):
    """What the noise of a model's images consists of."""

    shape: tuple[int, ...]  # (C, H, W)
    num_calls: int
    in_steps: bool  # whether each step takes noise too


def chain_of(shape: Sequence[int], scheduler: SchedulerMixin, num_inference_steps: int) -> Chain:
    """The noise of images (C, H, W) `shape`; sets the timesteps of `scheduler`."""
    scheduler.set_timesteps(num_inference_steps)
    return Chain(tuple(shape), len(scheduler.timesteps), accepts_noise(scheduler))


def draw(
    parts: Iterable[tuple[Sequence[int], Sequence[int]]],
    shape: Sequence[int],
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    pin_memory: bool = False,
    upsamplers: Sequence[Chain] = (),
) -> Iterator[Noise]:
    """Yield the noise of each part (numbers, seeds) of images (C, H, W) `shape`: a `Batch`, then an entry per step.

    The same follows for each of `upsamplers`, from seeds of its own, before the next part. `pin_memory` is for copies
    to a GPU that do not wait.
    """
    return _draw(parts, [chain_of(shape, scheduler, num_inference_steps), *upsamplers], pin_memory)


def _draw(parts, chains: Sequence[Chain], pin_memory: bool) -> Iterator[Noise]:
    for numbers, seeds in parts:
        for stage, (shape, num_calls, in_steps) in enumerate(chains):
            own = [seed + stage * STAGE_SEEDS for seed in seeds]
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in own]
            size = (len(own), *shape)
            yield Batch(numbers, own, generators, _normal(size, generators, pin_memory), stage)
            for _ in range(num_calls):
                yield _normal(size, generators, pin_memory) if in_steps else None


def accepts_noise(scheduler: SchedulerMixin) -> bool:
    """Whether `step` draws noise of the image's shape once per call, and takes it as `variance_noise` instead."""
    return isinstance(scheduler, DPMSolverMultistepScheduler) and scheduler.config.algorithm_type.startswith("sde-")


def _normal(size: tuple[int, ...], generators: list[torch.Generator], pin_memory: bool) -> torch.Tensor:
    noise = randn_tensor(size, generator=generators, device=torch.device("cpu"), dtype=torch.float32)
    return noise.pin_memory() if pin_memory else noise
