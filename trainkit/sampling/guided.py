"""Guided samples of a model in training, by the pipeline that is going to be saved with it."""

# N images, H/W pixels, C channels

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from pipelines.conditional import ConditionalPipeline
from trainkit.sampling.conditional import decoded_shape, generate_conditional, stock_unet
from trainkit.sampling.generate import gather_images
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

    `batch_size` is a process's; each makes its share. `unet` is in evaluation mode; `components` are the pipeline's
    others, moved to its device for the while. Call it on every rank.
    """
    components = components or {}
    modules = [part for part in components.values() if isinstance(part, torch.nn.Module)]
    scheduler = scheduler_bundle(noise_scheduler)[DEFAULT_SCHEDULER]
    rank, world, count = accelerator.process_index, accelerator.num_processes, len(conditions)
    seeds = range(seed + rank, seed + count, world)
    with stock_unet(unet) as embedding:
        for module in modules:
            module.to(accelerator.device)
        pipeline = ConditionalPipeline(unet, scheduler, vector_embedding=embedding, **components)
        batches = generate_conditional(
            pipeline, conditions[rank::world], seeds, num_inference_steps, batch_size, guidance_scale=guidance_scale
        )
        images = gather_images(accelerator, batches, count, decoded_shape(pipeline))
    for module in modules:
        module.to("cpu")
    return images
