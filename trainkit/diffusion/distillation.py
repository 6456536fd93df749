"""Progressive distillation: one step of the student does what two steps of the teacher do (Salimans & Ho 2022).

Teacher and student see z = alpha image + sigma noise with alpha^2 + sigma^2 = 1 (variance preserving), whatever the
teacher was trained on: a flow-matching teacher gets z / (alpha + sigma), which is its own mixture of image and noise.
"""

# B batch, C channels, H/W pixels, T timesteps of the teacher, N steps of the student

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from trainkit.data.loading.loader import Batch
from trainkit.diffusion.few_step import step_timesteps


def student_prediction(teacher_prediction: str) -> str:
    """What a student predicts: the image if its teacher does, else the velocity.

    Both are well-posed at every noise level (Salimans & Ho 2022, section 4). Noise is not: where little of the image
    is left, its error is multiplied by sigma / alpha.
    """
    return "sample" if teacher_prediction == "sample" else "v_prediction"


def to_images(
    prediction_type: str, prediction: torch.Tensor, noisy: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The image (B, C, H, W) that `prediction` means for `noisy` = alpha image + sigma noise."""
    if prediction_type == "sample":
        return prediction
    if prediction_type == "v_prediction":
        return alpha * noisy - sigma * prediction
    if prediction_type == "epsilon":
        return (noisy - sigma * prediction) / alpha
    if prediction_type == "flow_prediction":  # of z / (alpha + sigma) at t = sigma / (alpha + sigma)
        return (noisy - sigma * prediction) / (alpha + sigma)
    raise ValueError(f"unknown prediction_type {prediction_type}")


@dataclass
class Teacher:
    """A frozen UNet that predicts images from noisy ones. `unconditional` gives a batch its null conditions."""

    unet: torch.nn.Module
    prediction_type: str
    clip: bool  # its images to [-1, 1], as its own sampler does
    autocast: Callable[[], AbstractContextManager]
    guidance_scale: float = 1.0
    unconditional: Callable[[Batch], Batch] = lambda batch: replace(batch, condition={})

    def images(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """The images (B, C, H, W) float32 in `noisy` at `timesteps` (B,), with factors (B, 1, 1, 1)."""
        given = noisy / (alpha + sigma) if self.prediction_type == "flow_prediction" else noisy
        with self.autocast():
            prediction = self.unet(batch.with_picture(given), timesteps, **batch.inputs).sample.float()
            if self.guidance_scale > 1:  # Ho & Salimans 2022, Eq. 6
                without = self.unconditional(batch)
                null = self.unet(without.with_picture(given), timesteps, **without.inputs).sample.float()
                prediction = null + self.guidance_scale * (prediction - null)
        images = to_images(self.prediction_type, prediction, noisy, alpha, sigma)
        return images.clamp(-1, 1) if self.clip else images


class StepGrid:
    """The noise levels of `num_steps` steps over the schedule alpha_bar (T,), on `device`; number 0 is the image."""

    def __init__(self, alphas_cumprod: torch.Tensor, num_steps: int, device: torch.device):
        timesteps = step_timesteps(len(alphas_cumprod), num_steps)
        levels = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[timesteps]])
        self.timesteps = torch.cat([timesteps.new_zeros(1), timesteps]).to(device)
        self.alphas, self.sigmas = (level.sqrt().float().to(device) for level in (levels, 1 - levels))

    def at(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Timesteps (B,), alpha and sigma (B, 1, 1, 1) of the step `numbers` (B,)."""
        alpha, sigma = (level[numbers][:, None, None, None] for level in (self.alphas, self.sigmas))
        return self.timesteps[numbers], alpha, sigma


def progressive_losses(
    model: torch.nn.Module,
    teacher: Teacher,
    grid: StepGrid,
    substeps: int,
    prediction_type: str,
    batch: Batch,
    steps: torch.Tensor,
) -> torch.Tensor:
    """The loss (B,) float32 of a student at its `steps` (B,) int64 in [0, N), each `substeps` steps of `grid`.

    The error of the image, weighted by max(alpha^2 / sigma^2, 1), the truncated SNR (Salimans & Ho 2022, Eq. 9).
    """
    start = (steps + 1) * substeps
    timesteps, alpha, sigma = grid.at(start)
    noisy = alpha * batch.images + sigma * batch.noise
    with torch.no_grad():
        target = progressive_target(teacher, grid, start, substeps, noisy, batch)
    prediction = model(batch.with_picture(noisy), timesteps, **batch.inputs).sample.float()
    errors = (to_images(prediction_type, prediction, noisy, alpha, sigma) - target).square().flatten(1).mean(1)
    return (alpha / sigma).square().clamp(min=1).flatten() * errors


def progressive_target(
    teacher: Teacher, grid: StepGrid, start: torch.Tensor, substeps: int, noisy: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """The image (B, C, H, W) at which one DDIM step from `noisy` ends where `substeps` steps of the teacher end.

    Salimans & Ho 2022, algorithm 2: x = (z_end - (sigma_end / sigma) z) / (alpha_end - (sigma_end / sigma) alpha).
    """
    timesteps, alpha, sigma = grid.at(start)
    place, alpha_here, sigma_here = noisy, alpha, sigma
    for number in range(1, substeps + 1):
        images = teacher.images(place, timesteps, alpha_here, sigma_here, batch)
        timesteps, alpha_end, sigma_end = grid.at(start - number)
        kept = sigma_end / sigma_here
        place = alpha_end * images + kept * (place - alpha_here * images)  # a DDIM step (Song et al. 2021, Eq. 12)
        alpha_here, sigma_here = alpha_end, sigma_end
    kept = sigma_here / sigma
    return (place - kept * noisy) / (alpha_here - kept * alpha)
