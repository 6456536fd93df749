"""Copies from the host to the training device."""

import torch


def pins_memory(device: torch.device) -> bool:
    """Whether copies to `device` overlap with its work if they start in page-locked memory.

    MPS shares the memory of the host, and a copy to it that is not waited for may read memory that was freed.
    """
    return device.type in ("cuda", "xpu")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`. The host does not wait for the device's work, and the tensor may be freed at once."""
    if not pins_memory(device):
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
