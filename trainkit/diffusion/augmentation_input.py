"""Tell a UNet what was done to the images it trains on, so that it learns of images as they are: non-leaking
augmentation (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", appendix F.2).

    add_augmentation_input(unet, LABELS)                    # before the optimizer is made
    unet(noisy_images, timesteps, augmentation=labels)      # training
    with without_augmentation_input(unet):                  # validation, sampling, saving: a stock UNet2DModel
        ...

The layer has no bias, so at labels of zero, an image as it was, the network is the same with it and without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def add_augmentation_input(unet: torch.nn.Module, num_labels: int) -> None:
    """Give `unet` a linear layer from labels (B, num_labels) to what its time embedding starts from, in place.

    `unet(..., augmentation=labels)` then tells it of them; without that they are zero. They are an argument, as a
    compiled module takes tensors among its attributes for ones that never move, and would record CUDA graphs anew.

    It lies where diffusers' own TimestepEmbedding looks for the condition of its `forward`, which UNet2DModel never
    gives; so it is trained, averaged and checkpointed as every other weight is.
    """
    embedding = unet.time_embedding
    layer = torch.nn.Linear(num_labels, embedding.linear_1.in_features, bias=False)
    torch.nn.init.xavier_uniform_(layer.weight)  # as EDM's map_augment
    embedding.cond_proj = layer.to(embedding.linear_1.weight)
    embedding.augmentation = None
    embedding.register_forward_pre_hook(_pass_condition, with_kwargs=True)
    stock_forward = unet.forward

    def forward(*args, augmentation: torch.Tensor | None = None, **kwargs):  # no hook: those stay outside the graph
        embedding.augmentation = augmentation
        return stock_forward(*args, **kwargs)

    unet.forward = forward


@contextmanager
def without_augmentation_input(unet: torch.nn.Module) -> Iterator[None]:
    """`unet` as if it had never got the layer, weights and state dict included. Do not train inside."""
    layer, unet.time_embedding.cond_proj = unet.time_embedding.cond_proj, None
    unet.time_embedding.augmentation = None  # of the last training batch
    try:
        yield
    finally:
        unet.time_embedding.cond_proj = layer


def _pass_condition(embedding: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if embedding.augmentation is not None:
        args, kwargs = args[:1], kwargs | {"condition": embedding.augmentation}  # UNet2DConditionModel gives a None
    return args, kwargs
