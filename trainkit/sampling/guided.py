"""Guided samples of a model in training, by the pipeline that is going to be saved with it."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from trainkit.sampling.conditional import conditional_pipeline, generate_conditional_over_processes
from trainkit.sampling.schedulers import DEFAULT_SCHEDULER, scheduler_bundle


def samples_of_conditions(
    accelerator: Accelerator,
    unet: torch.nn.Module,
    noise_scheduler: DDPMScheduler,
    conditions: Sequence,
    seed: int,
    num_inference_steps: int,
    batch_size: int,
    guidance_scale: float,
    components: dict | None = None,
) -> np.ndarray:
    """Images (N, H, W, C) uint8 on every rank, one for each of `conditions`, from the seeds `seed`, `seed` + 1, ...

    `batch_size` is a process's; each makes its share. `components` are the pipeline's others, moved to the device for
    the while. Call it on every rank.
    """
    components = components or {}
    modules = [part for part in components.values() if isinstance(part, torch.nn.Module)]
    scheduler = scheduler_bundle(noise_scheduler)[DEFAULT_SCHEDULER]
    for module in modules:
        module.to(accelerator.device)
    with conditional_pipeline(unet, scheduler, **components) as pipeline:
        images = generate_conditional_over_processes(
            accelerator, pipeline, conditions, seed, num_inference_steps, batch_size, guidance_scale=guidance_scale
        )
    for module in modules:
        module.to("cpu")
    return images
