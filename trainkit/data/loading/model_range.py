"""From stored pixels to the numbers that a model sees."""

# B batch, C channels, H/W pixels

import numpy as np
import torch

from trainkit.data.loading.conditioning_images import SecondImages


def to_model_range(pixels: torch.Tensor, bit_depth: int) -> torch.Tensor:
    """Return float32 images (B, C, H, W) in [-1, 1] of stored `pixels` (B, H, W, C) with `bit_depth` bits."""
    return channels_first(pixels).div_((2**bit_depth - 1) / 2).sub_(1)


def conditions_to_model_range(gathered: torch.Tensor, stored: SecondImages) -> torch.Tensor:
    """Return gathered conditioning images (B, H, W, C) as float32 (B, C, H, W): in [-1, 1], or ids of label maps."""
    return channels_first(gathered) if stored.are_label_maps else to_model_range(gathered, stored.settings.bit_depth)


def channels_first(images: torch.Tensor) -> torch.Tensor:
    """Return float32 (B, C, H, W) of `images` (B, H, W, C)."""
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def to_host_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Return `pixels` as a tensor; int32 for uint16, with which torch cannot compute."""
    return torch.from_numpy(pixels.astype(np.int32) if pixels.dtype == np.uint16 else pixels)
