"""Several conditions at once: a class, a vector or a caption, and another image, or a class and a vector.

Each is dropped by its own draw.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.order import DropoutDraws, sample_indices
from trainkit.diffusion.image_condition import PictureCondition


class CombinedCondition:
    """`parts` together, with the members of ClassCondition (conditioning.py); a second image is the last of them.

    A condition of the pipeline is a dict of its arguments.
    """

    def __init__(self, parts: Sequence[Any]):
        self.parts = parts
        self.picture: PictureCondition | None = parts[-1].picture
        self.argument = parts[0].argument if self.picture is None else self.picture.argument
        self.names = next((part.names for part in parts if part.names is not None), None)

    @property
    def components(self) -> dict:
        """Arguments of the saved pipeline."""
        return {name: value for part in self.parts for name, value in part.components.items()}

    @property
    def unet_config(self) -> dict:
        """Entries of the UNet's config. A class and a vector have one embedding, which has the classes too."""
        return {name: value for part in self.parts for name, value in part.unet_config.items()}

    def for_images(self, images: PreparedImages) -> "CombinedCondition":
        """The same conditions for other (held-out) `images`."""
        return CombinedCondition([part.for_images(images) for part in self.parts])

    def inputs(self, indices: np.ndarray, draws: DropoutDraws | None = None) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model; a second image is concatenated to its input.

        A class and a vector are `class_labels` (B, 1 + D) float32: see VectorEmbedding.
        """
        inputs: dict[str, torch.Tensor] = {}
        for part in self.parts:
            for name, value in part.inputs(indices, draws).items():
                both = name in inputs
                inputs[name] = torch.cat([inputs[name][:, None].float(), value], dim=1) if both else value
        return inputs

    def example(self) -> str:
        """Conditions written as arguments of the pipeline, for the model card: `argument` is the first."""
        first, *others = sorted(self.parts, key=lambda part: part.argument != self.argument)
        return ", ".join([first.example(), *(f"{part.argument}={part.example()}" for part in others)])

    def pipeline_conditions(self, indices: np.ndarray) -> list[dict]:
        """The pipeline arguments that request images like those of `indices`."""
        rows: list[dict] = [{} for _ in indices]
        for part in self.parts:
            for row, condition in zip(rows, part.pipeline_conditions(indices), strict=True):
                row |= condition if isinstance(condition, dict) else {part.argument: condition}
        return rows

    def preview_conditions(self, count: int, seed: int) -> tuple[list[dict], None]:
        """The conditions of `count` images chosen by `seed`."""
        images = self.parts[-1].images
        return self.pipeline_conditions(sample_indices(np.arange(min(count, len(images))), len(images), seed)), None
