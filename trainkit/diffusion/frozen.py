"""Helpers for frozen networks whose outputs are computed once: text encoders and image autoencoders."""

import hashlib
import os

import torch


def state_digest(module: torch.nn.Module, *parts: str) -> str:
    """A digest (16 hex digits) of the weights of `module` and of `parts`, whatever file they were loaded from."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()


def local_device() -> torch.device:
    """The device that this process will train on, before Accelerate starts."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"):
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)))
