"""Seeded generation: image i depends on (model, scheduler, steps, condition i, seed i), not on the batch size."""

# N images, B batch, H/W pixels, C channels

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from pipelines.conditional import ConditionalPipeline
from pipelines.unconditional import UnconditionalPipeline
from trainkit.sampling.schedulers import check_steps

Pipeline: TypeAlias = DDPMPipeline | UnconditionalPipeline | ConditionalPipeline
MAXIMUM_VALUES = 2**24 - 1  # per batch: some versions of torch.quantile, which thresholding calls, accept no more


def generate(
    pipeline: Pipeline,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int,
    conditions: Sequence | np.ndarray | None = None,
    **guidance,
) -> Iterator[np.ndarray]:
    """Yield images (B, H, W, C) uint8, one per entry of `seeds` and in their order, `batch_size` at a time.

    A ConditionalPipeline also needs one entry of `conditions` per seed: what `pipeline.condition` accepts (a class, a
    vector, a prompt) or None for the null condition. `guidance` is passed on: guidance_scale, guidance_interval,
    guidance_rescale. Noise is drawn from one CPU generator per image, so it is the same on any device. Runs on the
    pipeline's device under the caller's autocast; the chain itself stays float32.

    Raises:
        UserError: the scheduler does not accept `num_inference_steps`.
    """
    check_steps(pipeline.scheduler, num_inference_steps)
    batch_size = _limited_batch_size(pipeline.unet, batch_size)
    pipeline.set_progress_bar_config(disable=True)
    with _evaluation_mode(pipeline):
        for start in range(0, len(seeds), batch_size):
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch_size]]
            inputs: dict[str, Any] = {"batch_size": len(generators)}
            if conditions is not None:
                inputs = {pipeline.condition: list(conditions[start : start + batch_size])} | guidance
            inputs |= {"generator": generators, "num_inference_steps": num_inference_steps, "output_type": "pt"}
            output: Any = pipeline(**inputs)
            yield to_uint8(output.images)


def generate_on_all_ranks(
    accelerator: Accelerator,
    pipeline: Pipeline,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int,
    conditions: Sequence | np.ndarray | None = None,
    **guidance,
) -> np.ndarray:
    """Images (N, H, W, C) uint8 of all `seeds`, on every rank; each rank generates its share. A collective.

    `batch_size` is per process. The arguments are those of `generate`. Components other than the UNet are on the
    device only while they are used.
    """
    rank, world, count = accelerator.process_index, accelerator.num_processes, len(seeds)
    share = np.zeros((-(-count // world), *image_shape(pipeline)), dtype=np.uint8)
    filled = 0
    with _components_on(pipeline, accelerator.device), accelerator.autocast():
        own = None if conditions is None else conditions[rank::world]
        for images in generate(pipeline, seeds[rank::world], num_inference_steps, batch_size, own, **guidance):
            share[filled : filled + len(images)] = images
            filled += len(images)
    gathered = accelerator.gather(torch.from_numpy(share).to(accelerator.device)).cpu().numpy()
    by_rank = gathered.reshape(world, *share.shape)
    return by_rank.swapaxes(0, 1).reshape(-1, *share.shape[1:])[:count]


def image_shape(pipeline: Pipeline) -> tuple[int, int, int]:
    """(H, W, C) of the images that `pipeline` generates."""
    (height, width), vae = _sample_size(pipeline.unet), getattr(pipeline, "vae", None)
    if vae is None:
        return height, width, pipeline.unet.config.out_channels
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return height * factor, width * factor, vae.config.out_channels


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """(B, H, W, C) uint8 from (B, C, H, W) in [0, 1]."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _sample_size(unet: UNet2DModel | UNet2DConditionModel) -> tuple[int, int]:
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _limited_batch_size(unet: UNet2DModel | UNet2DConditionModel, batch_size: int) -> int:
    height, width = _sample_size(unet)
    return max(1, min(batch_size, MAXIMUM_VALUES // (unet.config.in_channels * height * width)))


def _modules(pipeline: Pipeline) -> list[torch.nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


@contextmanager
def _evaluation_mode(pipeline: Pipeline) -> Iterator[None]:
    """Evaluation mode inside the block. A stock pipeline also gets float32 output from its UNet under autocast,
    because the solvers cast the image to the type of that output; the other two do this themselves."""
    were_training = [(module, module.training) for module in _modules(pipeline)]
    for module, _ in were_training:
        module.eval()
    hook = None
    if isinstance(pipeline, DDPMPipeline):
        hook = pipeline.unet.register_forward_hook(
            lambda module, inputs, output: UNet2DOutput(sample=output.sample.float())
        )
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        for module, was_training in were_training:
            module.train(was_training)


@contextmanager
def _components_on(pipeline: Pipeline, device: torch.device) -> Iterator[None]:
    """The components other than the UNet on `device` inside the block, and back where they were after it."""
    others = [module for module in _modules(pipeline) if module is not pipeline.unet]
    homes = [next(module.parameters()).device for module in others]
    try:
        for module in others:
            module.to(device)
        yield
    finally:
        for module, home in zip(others, homes, strict=True):
            module.to(home)
