"""Seeded generation: image i depends on (model, scheduler, steps, seed i) alone, not on batches or processes."""

# N images, B batch, H/W pixels, C channels

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, SchedulerMixin, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from trainkit.sampling.schedulers import check_steps

MAXIMUM_VALUES = 2**24 - 1  # in one batch: torch.quantile, which thresholding calls, has versions that take no more


def generate(
    unet: UNet2DModel,
    scheduler: SchedulerMixin,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Iterator[np.ndarray]:
    """Yield images (B, H, W, C) uint8, one for each of `seeds` in their order, `batch_size` at a time.

    The noise comes from a CPU generator for each image, so it is the same on any device. Runs where `unet` is, under
    the caller's autocast; the chain itself stays float32. `progress(B)` is called after each batch.

    Raises:
        UserError: `scheduler` cannot take `num_inference_steps`.
    """
    check_steps(scheduler, num_inference_steps)
    batch_size = limited_batch_size(unet, batch_size)
    pipeline = DDPMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    with _inference_mode(unet):
        for start in range(0, len(seeds), batch_size):
            batch = seeded_generators(seeds[start : start + batch_size])
            yield to_uint8(pipeline(len(batch), batch, num_inference_steps, output_type="pt").images)
            if progress is not None:
                progress(len(batch))


def generate_over_processes(
    accelerator: Accelerator,
    unet: UNet2DModel,
    scheduler: SchedulerMixin,
    num_images: int,
    seed: int,
    num_inference_steps: int,
    batch_size: int,
) -> np.ndarray:
    """Images (N, H, W, C) uint8 of the seeds `seed` to `seed + num_images - 1`, on every rank; each makes its share.

    `batch_size` is a process's. Call it on every rank.
    """
    unet = accelerator.unwrap_model(unet)
    seeds = range(seed + accelerator.process_index, seed + num_images, accelerator.num_processes)
    batches = generate(unet, scheduler, seeds, num_inference_steps, min(batch_size, max(1, len(seeds))))
    return gather_images(accelerator, batches, num_images, (*image_size(unet), unet.config.in_channels))


def gather_images(
    accelerator: Accelerator, batches: Iterator[np.ndarray], num_images: int, shape: tuple[int, int, int]
) -> np.ndarray:
    """Images (N, H, W, C) uint8 on every rank, of which `batches` makes each `num_processes`-th from this rank on.

    `batches` runs under autocast. Call it on every rank.
    """
    world = accelerator.num_processes
    share = np.zeros((-(-num_images // world), *shape), dtype=np.uint8)
    with accelerator.autocast():
        filled = 0
        for images in batches:
            share[filled : filled + len(images)] = images
            filled += len(images)
    gathered = accelerator.gather(torch.from_numpy(share).to(accelerator.device)).cpu().numpy()
    by_rank = gathered.reshape(world, *share.shape)
    return by_rank.swapaxes(0, 1).reshape(-1, *share.shape[1:])[:num_images]


def limited_batch_size(unet: UNet2DModel, batch_size: int) -> int:
    height, width = image_size(unet)
    return max(1, min(batch_size, MAXIMUM_VALUES // (unet.config.in_channels * height * width)))


def seeded_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """(B, H, W, C) uint8 from (B, C, H, W) in [0, 1]."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def image_size(unet: UNet2DModel) -> tuple[int, int]:
    """Height and width in pixels of what `unet` generates."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


@contextmanager
def _inference_mode(unet: UNet2DModel) -> Iterator[None]:
    """Evaluation mode, and float32 output under autocast: the solvers cast the image to the type of the output."""
    was_training = unet.training
    unet.eval()
    hook = unet.register_forward_hook(lambda module, inputs, output: UNet2DOutput(sample=output.sample.float()))
    try:
        yield
    finally:
        hook.remove()
        unet.train(was_training)
