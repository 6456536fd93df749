"""Seeded generation: image i depends on (model, scheduler, steps, condition i, seed i), not on the batch size."""

# N images, B batch, H/W pixels, C channels

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline

from pipelines.conditional import ConditionalPipeline
from pipelines.guidance import checked_interval, noise_level
from pipelines.unconditional import UnconditionalPipeline, solve
from trainkit.sampling.noise import Batch, Chain, Noise, chain_of, draw
from trainkit.sampling.schedulers import check_steps

# (number of the call, timestep, scaled sample (B, C, H, W)) -> prediction (B, C, H, W) float32
Predict: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
Pipeline: TypeAlias = DDPMPipeline | UnconditionalPipeline | ConditionalPipeline
MAXIMUM_VALUES = 2**24 - 1  # per batch: some versions of torch.quantile, which thresholding calls, accept no more


class Upsampler(NamedTuple):
    """A super-resolution model that enlarges the images of the model before it."""

    pipeline: ConditionalPipeline
    num_inference_steps: int
    guidance: dict[str, Any]  # guidance_scale, image_noise

    @property
    def chain(self) -> Chain:
        """The noise of its images."""
        return chain_of(noise_shape(self.pipeline), self.pipeline.scheduler, self.num_inference_steps)


def generate(
    pipeline: Pipeline,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int,
    conditions: Sequence | np.ndarray | None = None,
    upsamplers: Sequence[Upsampler] = (),
    **guidance,
) -> Generator[np.ndarray, None, None]:
    """Yield images (B, H, W, C) uint8, one per entry of `seeds` and in their order, `batch_size` at a time.

    A ConditionalPipeline also needs one entry of `conditions` per seed: a class, a vector or a prompt, or a dict of
    the arguments in `pipeline.conditions`; None is the null condition. `guidance` is passed on: guidance_scale,
    guidance_interval, guidance_rescale, image_noise. `upsamplers` enlarge the images, one after the other.

    Noise is drawn from one CPU generator per image, so it is the same on any device. Runs on the
    pipeline's device under the caller's autocast; the chain itself stays float32.

    Raises:
        UserError: the scheduler does not accept `num_inference_steps`.
    """
    check_steps(pipeline.scheduler, num_inference_steps)
    batch_size = limited_batch_size(pipeline, batch_size, upsamplers)
    starts = range(0, len(seeds), batch_size)
    parts = ((range(start, start + batch_size), seeds[start : start + batch_size]) for start in starts)
    chains = [one.chain for one in upsamplers]
    noise = draw(parts, noise_shape(pipeline), pipeline.scheduler, num_inference_steps, upsamplers=chains)
    with evaluation_mode(pipeline):
        for batch in noise:
            assert isinstance(batch, Batch)  # `sample_batch` takes the noise of all steps
            own = None if conditions is None else conditions[batch.numbers[0] : batch.numbers[-1] + 1]
            images = sample_cascade(pipeline, upsamplers, batch, noise, num_inference_steps, own, **guidance)
            yield images.cpu().numpy()


def sample_cascade(
    pipeline: Pipeline,
    upsamplers: Sequence[Upsampler],
    batch: Batch,
    noise: Iterator[Noise],
    num_inference_steps: int,
    conditions: Sequence | np.ndarray | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    **guidance,
) -> torch.Tensor:
    """Images (B, H, W, C) uint8 of a `Batch` of `noise.draw`, of which `noise` yields the rest, also for `upsamplers`.

    An upsampler sees the images as they would be in files, and the same `conditions` as far as it takes them. Call it
    in `evaluation_mode`. The other arguments are those of `generate`.
    """
    images = to_uint8(sample_batch(pipeline, batch, noise, num_inference_steps, conditions, memory_format, **guidance))
    shared = {} if conditions is None else _by_argument(pipeline, list(conditions))
    for upsampler in upsamplers:
        larger = next(noise)
        assert isinstance(larger, Batch)  # the noise of one model follows that of the other
        own = {name: shared[name] for name in upsampler.pipeline.conditions if name in shared}
        own["image"] = list(images.permute(0, 3, 1, 2).cpu())
        rows = [dict(zip(own, row, strict=True)) for row in zip(*own.values(), strict=True)]
        given = upsampler.num_inference_steps, rows, memory_format
        images = to_uint8(sample_batch(upsampler.pipeline, larger, noise, *given, **upsampler.guidance))
    return images


def sample_batch(
    pipeline: Pipeline,
    batch: Batch,
    step_noise: Iterable,
    num_inference_steps: int,
    conditions: Sequence | np.ndarray | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    **guidance,
) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1] of a `Batch` of `noise.draw`, of which `step_noise` yields the noise of each step.

    Call it in `evaluation_mode`. The other arguments are those of `generate`.
    """
    pipeline.scheduler.set_timesteps(num_inference_steps)
    device = next(pipeline.unet.parameters()).device
    start = batch.start.to(device, memory_format=memory_format, non_blocking=True)
    with torch.no_grad():
        predict, pixels = predictor(pipeline, conditions, batch.generators, **guidance)
        samples = solve(pipeline.scheduler, predict, start, batch.generators, step_noise)
        return to_images(pipeline, samples, pixels)


def predictor(
    pipeline: Pipeline, conditions: Sequence | np.ndarray | None, generators: list[torch.Generator], **guidance
) -> tuple[Predict, torch.Tensor | None]:
    """The prediction of the UNet for a batch of images with these `conditions`, and the pixels of the second image.

    See `generate` for `guidance`.
    """
    unet, pixels = pipeline.unet, None
    predict: Predict
    if isinstance(pipeline, ConditionalPipeline):
        assert conditions is not None  # of a ConditionalPipeline
        predict, pixels = _guided(pipeline, list(conditions), generators, **guidance)
    else:

        def predict(index: int, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
            # float32 under autocast too: the solvers cast the image to the type of the prediction
            return unet(sample, timestep).sample.float()

    return (predict if unet._compiled_call_impl is None else _copied(predict)), pixels


def to_images(pipeline: Pipeline, samples: torch.Tensor, pixels: torch.Tensor | None = None) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1] of what the scheduler returns, decoded if those are latents.

    `pixels` are those of the second image (`ConditionalPipeline.encode`): known ones are kept.
    """
    if isinstance(pipeline, DDPMPipeline):
        return (samples / 2 + 0.5).clamp(0, 1)
    if isinstance(pipeline, ConditionalPipeline):
        return pipeline._finish(samples, "pt", pixels)
    return pipeline._finish(samples, "pt")


def _guided(
    pipeline: ConditionalPipeline,
    conditions: list,
    generators: list[torch.Generator],
    guidance_scale: float = 1.0,
    guidance_interval: Sequence[float] | None = None,
    guidance_rescale: float = 0.0,
    image_noise: float = 0.0,
) -> tuple[Predict, torch.Tensor | None]:
    """The prediction of each step, as ConditionalPipeline makes it in its own loop, and the second image's pixels."""
    low, high = checked_interval(guidance_scale, guidance_interval, guidance_rescale)
    encoded, _, pixels = pipeline.encode(1, image_noise, generators, **_by_argument(pipeline, conditions))
    pipeline._guidance_scale = guidance_scale

    def predict(index: int, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        is_guided = guidance_scale > 1 and low < noise_level(pipeline.scheduler, index, timestep) <= high
        return pipeline._predict(sample, timestep, encoded, is_guided, guidance_rescale)

    return predict, pixels


def _by_argument(pipeline: ConditionalPipeline, conditions: list) -> dict[str, Any]:
    """The `conditions` of images, one entry each, as arguments of the pipeline."""
    if isinstance(conditions[0], dict):
        return {name: [row.get(name) for row in conditions] for name in pipeline.conditions}
    return {pipeline.conditions[0]: conditions}


def _copied(predict: Predict) -> Predict:
    """`predict` with a copy of its output: a CUDA graph writes the next one over it, and solvers keep some."""
    return lambda index, timestep, sample: predict(index, timestep, sample).clone()


def generate_in_blocks(
    accelerator: Accelerator,
    pipeline: Pipeline,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int,
    conditions: Sequence | np.ndarray | None = None,
    upsamplers: Sequence[Upsampler] = (),
    **guidance,
) -> Iterator[np.ndarray]:
    """Yield images (B, H, W, C) uint8 of `seeds`, in their order, on every rank. Each block is a collective.

    A block has one batch of each rank, of `batch_size` images. The arguments are those of `generate`. Components other
    than the UNet are on the device only while they are used.
    """
    rank, world, count = accelerator.process_index, accelerator.num_processes, len(seeds)
    batch_size = limited_batch_size(pipeline, batch_size, upsamplers)
    shape = image_shape(upsamplers[-1].pipeline if upsamplers else pipeline)
    own = None if conditions is None else conditions[rank::world]
    batches = generate(pipeline, seeds[rank::world], num_inference_steps, batch_size, own, upsamplers, **guidance)
    with _components_on(pipeline, accelerator.device), accelerator.autocast(), closing(batches):
        for start in range(0, count, world * batch_size):
            size = min(world * batch_size, count - start)
            share = np.zeros((-(-size // world), *shape), dtype=np.uint8)  # a rank may have one image less, or none
            for images in islice(batches, 1):
                share[: len(images)] = images
            gathered = accelerator.gather(torch.from_numpy(share).to(accelerator.device)).cpu().numpy()
            by_rank = gathered.reshape(world, *share.shape)
            yield by_rank.swapaxes(0, 1).reshape(-1, *shape)[:size]


def image_shape(pipeline: Pipeline) -> tuple[int, int, int]:
    """(H, W, C) of the images that `pipeline` generates."""
    (height, width), vae = _sample_size(pipeline), getattr(pipeline, "vae", None)
    if vae is None:
        return height, width, pipeline.unet.config.out_channels
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return height * factor, width * factor, vae.config.out_channels


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """(B, H, W, C) uint8 from (B, C, H, W) in [0, 1], on their device."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _sample_size(pipeline: Pipeline) -> tuple[int, int]:
    if isinstance(pipeline, ConditionalPipeline):
        return pipeline.size
    size = pipeline.unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def noise_shape(pipeline: Pipeline) -> tuple[int, int, int]:
    """(C, H, W) of the noise that an image of `pipeline` starts from."""
    return (pipeline.unet.config.out_channels, *_sample_size(pipeline))


def limited_batch_size(pipeline: Pipeline, batch_size: int, upsamplers: Sequence[Upsampler] = ()) -> int:
    """`batch_size`, or as many images as thresholding can handle at once."""
    largest = max(math.prod(noise_shape(one)) for one in (pipeline, *(upsampler.pipeline for upsampler in upsamplers)))
    return max(1, min(batch_size, MAXIMUM_VALUES // largest))


def _modules(pipeline: Pipeline) -> list[torch.nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


@contextmanager
def evaluation_mode(pipeline: Pipeline) -> Iterator[None]:
    """All modules of the pipeline in evaluation mode inside the block."""
    were_training = [(module, module.training) for module in _modules(pipeline)]
    for module, _ in were_training:
        module.eval()
    try:
        yield
    finally:
        for module, was_training in were_training:
            module.train(was_training)


@contextmanager
def _components_on(pipeline: Pipeline, device: torch.device) -> Iterator[None]:
    """The components other than the UNet on `device` inside the block, and back where they were after it."""
    others = [module for module in _modules(pipeline) if module is not pipeline.unet]
    homes = [next(chain(module.parameters(), module.buffers())).device for module in others]
    try:
        for module in others:
            module.to(device)
        yield
    finally:
        for module, home in zip(others, homes, strict=True):
            module.to(home)
