"""Guidance and the checks of a pipeline's other settings. Saved inside models with the pipeline.

Keep the functions: diffusers gives all models of a process the file of the first one that it loads.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback


def noise_level(scheduler, index: int, timestep: torch.Tensor) -> float:
    """The noise level at a step: sigma of Karras et al. 2022, noise relative to the image."""
    if "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas"):
        sigma = float(scheduler.sigmas[index])
        return math.inf if sigma >= 1 else sigma / (1 - sigma)
    if hasattr(scheduler, "alphas_cumprod"):
        alphas_cumprod = scheduler.alphas_cumprod.cpu().double().numpy()  # MPS has no float64
        alpha = np.interp(float(timestep), np.arange(len(alphas_cumprod)), alphas_cumprod)
        return math.inf if alpha <= 0 else math.sqrt((1 - alpha) / alpha)
    return float(scheduler.sigmas[index])


def checked_interval(scale: float, interval: Sequence[float] | None, rescale: float) -> tuple[float, float]:
    """The noise levels (low, high) to guide between; `ValueError` for invalid guidance."""
    if not 1 <= scale < math.inf:
        raise ValueError(f"guidance_scale {scale} must be at least 1 (no guidance)")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale {rescale} must be 0 to 1")
    if interval is None:
        return 0.0, math.inf
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise ValueError(f"guidance_interval {interval}: give two noise levels, the lower first, both at least 0")
    return interval[0], interval[1]


def check_guide(unet, guide, embedding, guide_embedding) -> None:
    """Raise `ValueError` if the UNet `guide` has classes or vectors, but other ones than `unet`.

    The embeddings are those of vectors, or None.
    """
    if guide.class_embedding is None:
        return
    keys = "class_embed_type", "num_class_embeds"
    kinds = [[one.config.get(key) for key in keys] for one in (unet, guide)]
    if embedding is not None and guide_embedding is not None:
        keys = "vector_length", "num_class_embeds"
        kinds = [[one.config.get(key) for key in keys] for one in (embedding, guide_embedding)]
    if kinds[0] != kinds[1]:
        has = " and ".join(f"{key} {value}, not {own}" for key, own, value in zip(keys, *kinds, strict=True))
        raise ValueError(f"guidance_unet must take the model's conditions, or no classes and vectors (it has {has})")


def check_output(num_images_per_prompt: int, num_inference_steps: int | None, output_type: str) -> None:
    """Raise `ValueError` for counts below 1 and unknown output types."""
    if num_images_per_prompt < 1 or (num_inference_steps is not None and num_inference_steps < 1):
        raise ValueError("num_images_per_prompt and num_inference_steps must be at least 1")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type {output_type!r} is none of pil, np, pt, latent")


def callback_tensors(callback, given: Sequence[str] | None) -> set[str]:
    """The names of the tensors that a callback wants. Raises `ValueError` for unknown ones."""
    own = isinstance(callback, PipelineCallback | MultiPipelineCallbacks)
    tensors = set((callback.tensor_inputs if own else given) or ())
    if not tensors <= {"latents"}:
        raise ValueError("callback_on_step_end_tensor_inputs: only ['latents'] can be given")
    return tensors


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, factor: float) -> torch.Tensor:
    """`guided` with its contrast rescaled towards that of `conditional` (Lin et al. 2023, Eq. 15 and 16)."""
    axes = list(range(1, guided.ndim))
    matched = guided * (conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return factor * matched + (1 - factor) * guided
