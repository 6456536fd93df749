"""A second image that is stored with each image of a dataset of pairs: a picture, or a map of class ids.

B batch, C channels, K channels of the second image, H/W pixels, N classes.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL

from pipelines.image_input import MODES, ImageInput
from trainkit.data.loading.augment import to_training_size
from trainkit.data.loading.conditioning_images import ConditioningImages, label_colours, side_by_side
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.model_range import conditions_to_model_range, to_host_tensor
from trainkit.data.pairing import PairSettings, describe_pairs
from trainkit.diffusion.image_condition import PictureCondition, interleaved, to_uint8
from trainkit.diffusion.latents import check_pictures, latent_grid
from trainkit.errors import UserError

PAIRED_KINDS = ("picture", "labels")  # of ImageInput


class PairedCondition(PictureCondition):
    """The conditioning image of each of `images`, with the members of PictureCondition."""

    stored: ConditioningImages

    def __init__(self, images: PreparedImages, dropout: float = 0.0, vae: AutoencoderKL | None = None):
        assert images.pairs is not None  # by open_or_prepare
        super().__init__(images, paired_input(images.pairs, images.channels, vae), dropout, vae)
        self.pairs, self.stored = images.pairs, ConditioningImages(images)

    def for_images(self, images: PreparedImages) -> "PairedCondition":
        """The same condition for other (held-out) `images`. Raises `UserError` if theirs are of another kind."""
        if images.pairs != self.pairs:
            raise UserError(
                f"--validation_data_dir has {describe_pairs(images.pairs)}, the training data "
                f"{describe_pairs(self.pairs)}: prepare both the same way"
            )
        return PairedCondition(images, vae=self.vae)

    def example(self) -> str:
        """A condition written as an argument of the pipeline, for the model card."""
        return "picture" if self.pairs.classes is None else "label_map"

    def pictures(self, indices: np.ndarray) -> torch.Tensor:
        """The conditioning images (B, _, H, W) of `indices`, without augmentation: in [-1, 1], or ids."""
        found = conditions_to_model_range(to_host_tensor(self.stored.gather(indices)), self.stored)
        return to_training_size(found, (self.images.height, self.images.width), self.stored.are_label_maps)

    def source(self, images: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
        """The conditioning images of `indices` on the device of `images`."""
        return self.pictures(indices).to(images.device)

    def pipeline_conditions(self, indices: np.ndarray) -> list[dict[str, np.ndarray]]:
        """The pipeline arguments that request images like those of `indices`: numbers in [0, 1], or ids (H, W)."""
        if self.pairs.classes is None:
            return super().pipeline_conditions(indices)
        return [{"image": ids.numpy().astype(np.uint8)} for ids in self.pictures(indices)[:, 0]]

    def beside(self, samples: np.ndarray, seed: int) -> np.ndarray:
        """Condition, sample and true image (3 N, H, W, _) uint8, in colour if one of them is, as label maps are."""
        indices = self._preview_indices(len(samples), seed)
        found, classes = self.pictures(indices), self.pairs.classes
        shown = to_uint8(found) if classes is None else label_colours(classes)[found[:, 0].long().numpy()]
        return interleaved(*side_by_side(shown, samples, to_uint8(self._centres(indices))))


def paired_input(pairs: PairSettings, channels: int, vae: AutoencoderKL | None = None) -> ImageInput:
    """The input of a model for pairs whose images have `channels`. Raises `UserError` if `vae` cannot encode them."""
    if pairs.classes is not None:
        return ImageInput(kind="labels", channels=channels, classes=pairs.classes, **latent_grid(vae))
    if vae is not None:
        check_pictures(vae.config, pairs.channels)
    return ImageInput(kind="picture", channels=channels, picture_channels=pairs.channels, **latent_grid(vae))


def pairs_of_input(image_input: ImageInput | None) -> PairSettings | None:
    """The pairs that a model with this input was trained on; None if it was trained on none."""
    if image_input is None or image_input.kind not in PAIRED_KINDS:
        return None
    if image_input.kind == "labels":
        return PairSettings("L", image_input.classes)
    return PairSettings(MODES[image_input.picture_channels])
