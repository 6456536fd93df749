"""Two conditions at once: a class, a vector or a caption, and another image. Each is dropped by its own draw."""

import numpy as np
import torch

from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.order import sample_indices
from trainkit.diffusion.image_condition import PictureCondition


class CombinedCondition:
    """`first` and `picture` together, with the members of ClassCondition (conditioning.py).

    A condition of the pipeline is a dict of its arguments.
    """

    def __init__(self, first, picture: PictureCondition):
        self.first, self.picture = first, picture
        self.argument, self.names = picture.argument, first.names

    @property
    def components(self) -> dict:
        """Arguments of the saved pipeline."""
        return self.first.components | self.picture.components

    @property
    def unet_config(self) -> dict:
        """Entries of the UNet's config."""
        return self.first.unet_config | self.picture.unet_config

    def for_images(self, images: PreparedImages) -> "CombinedCondition":
        """The same conditions for other (held-out) `images`."""
        return CombinedCondition(self.first.for_images(images), self.picture.for_images(images))

    def inputs(self, indices: np.ndarray, uniforms: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model: those of `first`; the second image is concatenated to its input."""
        return self.first.inputs(indices, uniforms)

    def example(self) -> str:
        """Conditions written as arguments of the pipeline, for the model card."""
        return f"{self.picture.example()}, {self.first.argument}={self.first.example()}"

    def pipeline_conditions(self, indices: np.ndarray) -> list[dict]:
        """The pipeline arguments that request images like those of `indices`."""
        first, pictures = (one.pipeline_conditions(indices) for one in (self.first, self.picture))
        return [{self.first.argument: one} | picture for one, picture in zip(first, pictures, strict=True)]

    def preview_conditions(self, count: int, seed: int) -> tuple[list[dict], None]:
        """The conditions of `count` images chosen by `seed`."""
        images = self.picture.images
        return self.pipeline_conditions(sample_indices(np.arange(min(count, len(images))), len(images), seed)), None
