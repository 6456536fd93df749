"""Images as they denoise: the chain of `generate`, with a look at what the model expects the result to be."""

# B batch, C channels, H/W pixels

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from diffusers import SchedulerMixin

from pipelines.conditional import noise_level
from pipelines.unconditional import solve_steps
from trainkit.sampling.generate import Pipeline, predictor, to_images
from trainkit.sampling.noise import Batch


@torch.no_grad()
def preview_batch(
    pipeline: Pipeline,
    batch: Batch,
    step_noise: Iterable,
    num_inference_steps: int,
    num_previews: int,
    conditions: Sequence | np.ndarray | None = None,
    **guidance,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (calls of the UNet so far, images (B, C, H, W) in [0, 1]); the last images are those of `sample_batch`.

    About `num_previews` times before, the images are what the model's last prediction says they will be: the denoised
    image of that step. Call it in `evaluation_mode`. The other arguments are those of `sample_batch`.
    """
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(num_inference_steps)
    start = batch.start.to(next(pipeline.unet.parameters()).device)
    total = len(scheduler.timesteps)
    every = max(1, math.ceil(total / (num_previews + 1)))
    predict, pixels = predictor(pipeline, conditions, batch.generators, **guidance)
    seen: dict[int, torch.Tensor] = {}

    def observed(call: int, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        prediction = predict(call, timestep, sample)
        if (call + 1) % every == 0 and call + 1 < total:
            seen[call] = denoised(scheduler, call, timestep, sample, prediction)
        return prediction

    for call, sample in enumerate(solve_steps(scheduler, observed, start, batch.generators, step_noise)):
        if call + 1 == total:
            yield total, to_images(pipeline, sample, pixels)
        elif call in seen:
            yield call + 1, to_images(pipeline, seen.pop(call), pixels)


def denoised(
    scheduler: SchedulerMixin, call: int, timestep: torch.Tensor, sample: torch.Tensor, prediction: torch.Tensor
) -> torch.Tensor:
    """The image (B, C, H, W) that `prediction` implies for `sample`, the model's input at this call.

    With noise level sigma, `sample` is (image + sigma noise) / sqrt(1 + sigma^2), or for flow matching
    (1 - t) image + t noise.
    """
    kind = "flow_prediction" if "FlowMatch" in type(scheduler).__name__ else scheduler.config.prediction_type
    if kind == "sample":
        return prediction
    sigma = noise_level(scheduler, call, timestep)
    if kind == "flow_prediction":
        time = 1.0 if math.isinf(sigma) else sigma / (1 + sigma)
        return sample - time * prediction
    alpha = 0.0 if math.isinf(sigma) else 1 / math.sqrt(1 + sigma**2)
    noise = math.sqrt(1 - alpha**2)
    if kind == "v_prediction":
        return alpha * sample - noise * prediction
    return (sample - noise * prediction) / max(alpha, 1e-4)
