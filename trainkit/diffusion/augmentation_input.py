"""Non-leaking augmentation: the UNet is given the augmentation of each training image, so samples do not show it.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", appendix F.2.

    add_augmentation_input(unet, LABELS)                    # before the optimizer is made
    unet(noisy_images, timesteps, augmentation=labels)      # training
    with without_augmentation_input(unet):                  # validation, sampling, saving: a stock UNet2DModel
        ...

The layer has no bias: for an unchanged image, whose labels are zero, the network computes the same without the layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DModel


def add_augmentation_input(unet: UNet2DModel, num_labels: int) -> None:
    """Add to `unet`, in place, a linear layer from labels (B, num_labels) to the input of its time embedding.

    `unet(..., augmentation=labels)` passes the labels; by default they are zero. They are an argument because a
    compiled module treats tensor attributes as constant and would record its CUDA graphs again.

    The layer is stored where diffusers' own TimestepEmbedding expects the projection of its `condition`, an input that
    UNet2DModel never uses. It is therefore trained, averaged and checkpointed like every other weight.
    """
    embedding = unet.time_embedding
    layer = torch.nn.Linear(num_labels, embedding.linear_1.in_features, bias=False)
    torch.nn.init.xavier_uniform_(layer.weight)  # as EDM's map_augment
    embedding.cond_proj = layer.to(embedding.linear_1.weight)
    embedding.augmentation = None
    embedding.register_forward_pre_hook(_pass_condition, with_kwargs=True)
    stock_forward = unet.forward

    def forward(*args, augmentation: torch.Tensor | None = None, **kwargs):  # hooks are not compiled
        embedding.augmentation = augmentation
        return stock_forward(*args, **kwargs)

    unet.forward = forward


@contextmanager
def without_augmentation_input(unet: UNet2DModel) -> Iterator[None]:
    """Remove the layer from `unet` inside the block, also from its state dict. Do not train inside."""
    layer, unet.time_embedding.cond_proj = unet.time_embedding.cond_proj, None
    unet.time_embedding.augmentation = None  # of the last training batch
    try:
        yield
    finally:
        unet.time_embedding.cond_proj = layer


def _pass_condition(embedding: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if embedding.augmentation is not None:
        args, kwargs = args[:1], kwargs | {"condition": embedding.augmentation}  # UNet2DConditionModel passes None
    return args, kwargs
