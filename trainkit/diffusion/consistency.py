"""Consistency tuning: the student predicts the same image from two neighbouring noise levels (Geng et al. 2024, ECT).

The neighbour comes closer over the run. In the first stages it is far, often the image itself, and the loss is that of
diffusion; at the end it is near, and the student maps any noise level to the end of its trajectory.

Where there is no noise, the student must return its input. Otherwise it may agree with itself on any constant once the
neighbours are near. A student that predicts the velocity does so: its image is alpha z - sigma velocity. A student
that predicts the image starts as the teacher itself, and gets the boundary condition of LCMScheduler.
"""

# B batch, C channels, H/W pixels, T timesteps; noise level s = sigma / alpha, as in Karras et al. 2022

import contextlib
import math

import torch

from trainkit.data.loading.loader import Batch
from trainkit.diffusion.distillation import to_images
from trainkit.diffusion.few_step import boundary_scaling, skip_scalings

P_MEAN, P_STD = -1.1, 2.0  # of ln s (Geng et al. 2024, section 4)
NUM_STAGES, SHRINK = 8, 2.0  # the gap to the neighbour is divided by SHRINK from stage to stage
NEAR_IMAGE, STEEPNESS = 8.0, 1.0  # k and b of n(s) = 1 + k sigmoid(-b s)
HUBER = 0.00054  # times the root of the number of values (Song & Dhariwal 2024, section 3.3)


class NoiseLevels:
    """Continuous timesteps of the schedule alpha_bar (T',) as a function of the noise level, on `device`.

    `prediction_type` is what the student predicts.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str, device: torch.device):
        self.prediction_type = prediction_type
        self.scaling = boundary_scaling(alphas_cumprod, prediction_type)
        levels = ((1 - alphas_cumprod) / alphas_cumprod.clamp(min=1e-12)).log() / 2
        self.first = 0 if torch.isfinite(levels[0]) else 1  # flow matching starts without noise
        self.logs = levels[self.first :].float().to(device)

    def draw(self, uniforms: torch.Tensor) -> torch.Tensor:
        """ln s (B,) of `uniforms` (B,) in [0, 1): normal with `P_MEAN` and `P_STD`, truncated to the schedule."""
        lowest, highest = (torch.special.ndtr((self.logs[end] - P_MEAN) / P_STD) for end in (0, -1))
        drawn = P_MEAN + P_STD * torch.special.ndtri(lowest + uniforms.to(lowest) * (highest - lowest))
        return drawn.clamp(self.logs[0], self.logs[-1])

    def timesteps(self, logs: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,) float32 of ln s (B,), interpolated between those of the schedule."""
        above = torch.searchsorted(self.logs, logs).clamp(1, len(self.logs) - 1)
        low, high = self.logs[above - 1], self.logs[above]
        return self.first + above - 1 + ((logs - low) / (high - low)).clamp(0, 1)

    def logs_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        """ln s (B,) at integer `timesteps` (B,); those above the schedule count as its last one."""
        return self.logs[(timesteps - self.first).clamp(0, len(self.logs) - 1)]


def neighbour(level: torch.Tensor, progress: float) -> torch.Tensor:
    """The noise level (B,) that `level` (B,) is compared with at `progress` (0 to 1) of the run; 0 is the image.

    r = s max(0, 1 - n(s) / q^(a + 1)), with stage a = 0, 1, ... and n(s) = 1 + k sigmoid(-b s) (Geng et al. 2024, Eq.
    16 and section 4).
    """
    stage = min(int(progress * NUM_STAGES), NUM_STAGES - 1)
    gap = (1 + NEAR_IMAGE * torch.sigmoid(-STEEPNESS * level)) / SHRINK ** (stage + 1)
    return level * (1 - gap).clamp(min=0)


def consistency_losses(
    model: torch.nn.Module,
    levels: NoiseLevels,
    batch: Batch,
    logs: torch.Tensor,
    progress: float,
) -> torch.Tensor:
    """The loss (B,) float32 of a student at the noise levels ln s = `logs` (B,).

    The pseudo-Huber distance (Song & Dhariwal 2024, Eq. 7) of the images predicted at s and at its neighbour r, with
    the same noise and the same dropout, over s - r. The image at r is not trained: it comes from the current weights.
    """
    level = logs.exp()
    near = neighbour(level, progress)
    near = torch.where(near > levels.logs[0].exp(), near, torch.zeros_like(near))
    plain = getattr(model, "module", model)  # DDP synchronises nothing in a forward pass without gradients
    with torch.no_grad(), _same_dropout(plain):
        target = _images_at(plain, levels, batch, near)
        target = torch.where((near > 0)[:, None, None, None], target, batch.images)
    images = _images_at(model, levels, batch, level)
    squares = (images - target).square().flatten(1).sum(1)
    huber = HUBER * math.sqrt(images[0].numel())
    return ((squares + huber**2).sqrt() - huber) / (level - near)


def _images_at(model: torch.nn.Module, levels: NoiseLevels, batch: Batch, level: torch.Tensor) -> torch.Tensor:
    """The images (B, C, H, W) that `model` predicts at the noise levels `level` (B,) of the batch's images."""
    timesteps = levels.timesteps(level.clamp(min=1e-12).log())
    alpha = (1 + level.square()).rsqrt()
    sigma = level * alpha
    alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
    noisy = alpha * batch.images + sigma * batch.noise
    prediction = model(batch.with_picture(noisy), timesteps, **batch.inputs).sample.float()
    skip, out = (factor[:, None, None, None] for factor in skip_scalings(timesteps, levels.scaling))
    return skip * noisy + out * to_images(levels.prediction_type, prediction, noisy, alpha, sigma)


def _same_dropout(model: torch.nn.Module) -> contextlib.AbstractContextManager:
    """Inside the block random numbers are drawn that will be drawn again after it, if `model` has any dropout."""
    dropout = any(module.p > 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    return torch.random.fork_rng() if dropout and model.training else contextlib.nullcontext()
