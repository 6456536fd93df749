"""Guided samples of a model in training, by the pipeline that is going to be saved with it."""

# N images, H/W pixels, C channels

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from pipelines.conditional import ConditionalPipeline
from trainkit.sampling.conditional import stock_unet
from trainkit.sampling.generate import image_size
from trainkit.sampling.schedulers import DEFAULT_SCHEDULER, check_steps, scheduler_bundle


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
    check_steps(scheduler, num_inference_steps)
    rank, world, count = accelerator.process_index, accelerator.num_processes, len(conditions)
    height, width, channels = *image_size(unet), unet.config.in_channels
    if vae := components.get("vae"):
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        height, width, channels = height * factor, width * factor, vae.config.out_channels
    share = torch.zeros(-(-count // world), height, width, channels, dtype=torch.uint8)
    rows = range(rank, count, world)
    with stock_unet(unet) as embedding, accelerator.autocast():
        for module in modules:
            module.to(accelerator.device)
        pipeline = ConditionalPipeline(unet, scheduler, vector_embedding=embedding, **components)
        pipeline.set_progress_bar_config(disable=True)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            images = pipeline(
                **{pipeline.condition: [conditions[row] for row in batch]},
                generator=[torch.Generator("cpu").manual_seed(seed + row) for row in batch],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                output_type="pt",
            ).images
            share[start : start + len(batch)] = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    for module in modules:
        module.to("cpu")
    gathered = accelerator.gather(share.to(accelerator.device)).cpu().numpy()
    by_rank = gathered.reshape(world, *share.shape)
    return by_rank.swapaxes(0, 1).reshape(-1, *share.shape[1:])[:count]
