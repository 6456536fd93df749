"""A second image that the model sees beside the noisy one, made from the image itself: no pairs are needed.

The second image is made on the device from the augmented image, so that geometry moves both alike. What is random in
it (masks, noise, dropout) is a function of (seed, step, row of the global batch), like all augmentation.

B batch, C channels, K channels of the second image, H/W pixels, h/w those of a small image.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL

from pipelines.image_input import ImageInput
from trainkit.data.loading.augment import to_training_size
from trainkit.data.loading.conditioning_images import PixelsOfLatents, SecondImages
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.loader import to_model_input
from trainkit.data.loading.masks import draw_mask
from trainkit.data.loading.model_range import to_host_tensor
from trainkit.data.loading.order import (
    DropoutDraws,
    Purpose,
    normal_draws,
    row_generator,
    sample_indices,
    uniform_draws,
)
from trainkit.data.pairing import PAIR_FLAGS
from trainkit.diffusion.latents import IMAGES_PER_FORWARD, latent_grid, load_vae
from trainkit.errors import UserError
from trainkit.options.model import DERIVED_KINDS
from trainkit.options.script import ConditionalTrainingOptions

FLAG = "--condition_from"
IMAGE_FLAGS = ("condition_from", "conditioning_noise", "image_dropout", "validation_conditioning_data_dir")
DEFAULT_NOISE = 0.2  # of small images


def check_image_options(options: ConditionalTrainingOptions) -> None:
    """Raise `UserError` for image conditions that contradict each other or the model."""
    given = options.condition_from
    if "image" not in options.condition:
        for name in (*IMAGE_FLAGS, *PAIR_FLAGS):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} {getattr(options, name)} needs --condition image")
        return
    kind = "" if given is None else parse_kind(given)[0]
    for name in (*PAIR_FLAGS, "validation_conditioning_data_dir"):
        if given is not None and getattr(options, name) is not None:
            raise UserError(
                f"--{name} {getattr(options, name)} is for conditioning images of the data, and {FLAG} {given} makes "
                "them from the images: leave one of them out"
            )
    if kind != "downscale" and options.conditioning_noise is not None:
        raise UserError(
            f"--conditioning_noise {options.conditioning_noise:g} is noise in a small image: it needs {FLAG} "
            "downscale:FACTOR"
        )
    if kind == "grayscale" and options.image_mode == "L":
        raise UserError(f"{FLAG} {given}: with --image_mode L the images are grey already; use RGB")


def parse_kind(given: str) -> tuple[str, int]:
    """Kind and factor of `--condition_from`. Raises `UserError` if there is no such kind."""
    kind, colon, number = given.partition(":")
    if kind == "downscale":
        if not number.isdecimal() or int(number) < 2:
            raise UserError(f"{FLAG} {given}: give the factor, a whole number of at least 2, such as downscale:4")
        return kind, int(number)
    if colon or kind not in DERIVED_KINDS:
        raise UserError(f"{FLAG} {given} is none of {', '.join(DERIVED_KINDS)}")
    return kind, 1


def condition_from(image_input: ImageInput) -> str:
    """The value of `--condition_from` that makes an `image_input`."""
    return f"downscale:{image_input.factor}" if image_input.kind == "downscale" else image_input.kind


def open_picture_condition(options: ConditionalTrainingOptions, images: PreparedImages) -> "PictureCondition":
    """The second image that `--condition_from` makes of `images`, else the one that is stored with each.

    Raises `UserError` if the images do not fit.
    """
    vae = load_vae(options)  # beside that of the latents: it stays on the device
    if options.condition_from is None:
        from trainkit.diffusion.paired_condition import PairedCondition  # late: it stands on this file

        return PairedCondition(images, image_dropout(options), vae)
    noise = DEFAULT_NOISE if options.conditioning_noise is None else options.conditioning_noise
    size = images.height, images.width, images.channels
    image_input = image_input_of(options.condition_from, *size, noise, **latent_grid(vae))
    return PictureCondition(images, image_input, image_dropout(options), vae)


def image_dropout(options: ConditionalTrainingOptions) -> float:
    """The probability of training an image without its second image."""
    return options.conditioning_dropout if options.image_dropout is None else options.image_dropout


def image_input_of(
    given: str, height: int, width: int, channels: int, noise: float = 0.0, **latent_grid: int
) -> ImageInput:
    """The input that `--condition_from` makes of images (channels, height, width). Raises `UserError`."""
    kind, factor = parse_kind(given)
    if height % factor or width % factor:
        raise UserError(
            f"{FLAG} {given}: images of {height}x{width} (HxW) cannot be made {factor} times smaller: use another "
            "factor, or another --resolution"
        )
    if kind == "grayscale" and channels == 1:
        raise UserError(f"{FLAG} grayscale: the images are grey already; prepare them with --image_mode RGB")
    noise = noise if kind == "downscale" else 0.0
    return ImageInput(kind=kind, channels=channels, factor=factor, noise=noise, **latent_grid)


class PictureCondition:
    """A second image made from each of `images`, with the members of ClassCondition (conditioning.py).

    With `vae` the model works on its latents, and second images, made from the pixels, are encoded at each visit.
    """

    argument, names = "image", None  # argument of the pipeline; there are no classes

    def __init__(
        self,
        images: PreparedImages,
        image_input: ImageInput,
        dropout: float = 0.0,
        vae: AutoencoderKL | None = None,
    ):
        self.images, self.image_input, self.dropout, self.vae = images, image_input, dropout, vae
        self.stored: SecondImages | None = None if vae is None else PixelsOfLatents(images)

    @property
    def picture(self) -> "PictureCondition":
        """The maker of the second image: see `PictureInput` of the loader."""
        return self

    @property
    def components(self) -> dict:
        """Components of the saved pipeline."""
        return {"image_input": self.image_input}

    @property
    def unet_config(self) -> dict:
        """Entries of the UNet's config for this condition."""
        channels = self.images.channels if self.vae is None else self.vae.config.latent_channels
        return {"in_channels": channels + self.image_input.num_channels}

    def for_images(self, images: PreparedImages) -> "PictureCondition":
        """The same condition for other (held-out) `images`."""
        return PictureCondition(images, self.image_input, vae=self.vae)

    def inputs(self, indices: np.ndarray, draws: DropoutDraws | None = None) -> dict[str, torch.Tensor]:
        """No keyword arguments of the model: the second image is concatenated to its input."""
        return {}

    def draw(self, seed: int, step: int, rows: Sequence[int], total: int) -> dict:
        """What is random in the second images of `rows`: see `PictureInput` of the loader."""
        here, kind, size = list(rows), self.image_input.kind, (self.images.height, self.images.width)
        dropped = uniform_draws(seed, step, Purpose.PICTURE_DROPOUT, total)[here] < self.dropout
        drawn = {"dropped": torch.from_numpy(dropped)}
        if kind == "mask":
            masks = [draw_mask(row_generator(seed, step, Purpose.MASK, row), *size) for row in rows]
            drawn["masks"] = torch.from_numpy(np.stack(masks)[:, None])
        if self.image_input.noise:
            small = self.image_input.channels, *(side // self.image_input.factor for side in size)
            drawn["noise"] = torch.from_numpy(normal_draws(seed, step, rows, small, Purpose.PICTURE_NOISE))
            levels = uniform_draws(seed, step, Purpose.PICTURE_NOISE_LEVEL, total)[here] * self.image_input.noise
            drawn["levels"] = torch.from_numpy(levels.astype(np.float32))
        return drawn

    def channels(self, images: torch.Tensor, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
        """The further input channels (B, K, H, W) for `images` (B, C, H, W) in [-1, 1], or for what is `stored`."""
        given = (drawn.get(name) for name in ("masks", "noise", "levels"))
        channels = self.image_input(self.image_input.pictures(images), *given)
        if self.vae is not None:
            channels = self._on_latents(channels, self.vae.to(channels.device))
        return torch.where(drawn["dropped"][:, None, None, None], self.image_input.null(channels), channels)

    def _on_latents(self, channels: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
        with torch.no_grad():
            parts = [self.image_input.on_latents(part, vae) for part in channels.split(IMAGES_PER_FORWARD)]
        return torch.cat(parts)

    def example(self) -> str:
        """A condition written as an argument of the pipeline, for the model card."""
        return "picture" + (", mask_image=mask" if self.image_input.kind == "mask" else "")

    def pipeline_conditions(self, indices: np.ndarray) -> list[dict[str, np.ndarray]]:
        """The pipeline arguments that request images like those of `indices`: arrays of numbers in [0, 1]."""
        pictures = self.pictures(indices).permute(0, 2, 3, 1).numpy() / 2 + 0.5
        conditions = [{"image": picture.clip(0, 1)} for picture in pictures]
        if self.image_input.kind == "mask":
            for condition, mask in zip(conditions, self._masks(indices), strict=True):
                condition["mask_image"] = mask.astype(np.float32)
        return conditions

    def preview_conditions(self, count: int, seed: int) -> tuple[list[dict[str, np.ndarray]], None]:
        """The conditions of `count` images chosen by `seed`; `beside` arranges their samples."""
        return self.pipeline_conditions(self._preview_indices(count, seed)), None

    def beside(self, samples: np.ndarray, seed: int) -> np.ndarray:
        """Condition, sample and true image (3 N, H, W, C) uint8 of each of the `samples` (N, H, W, C) of a preview."""
        indices = self._preview_indices(len(samples), seed)
        pictures = self.pictures(indices)
        if self.image_input.kind == "mask":
            pictures = torch.where(torch.from_numpy(self._masks(indices)[:, None]), 0.0, pictures)
        pictures = torch.nn.functional.interpolate(pictures, samples.shape[1:3], mode="nearest")
        truth = to_uint8(self._centres(indices), self.images.channels)
        return interleaved(to_uint8(pictures, self.images.channels), samples, truth)

    def pictures(self, indices: np.ndarray) -> torch.Tensor:
        """The pictures (B, _, h, w) of `indices` as a user would give them, without augmentation."""
        return self.image_input.pictures(self._centres(indices))

    def source(self, images: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
        """What `channels` makes the second images of, for `images` (B, C, H, W) that are not augmented."""
        return images if self.vae is None else self._centres(indices).to(images.device)

    def _masks(self, indices: np.ndarray) -> np.ndarray:
        """Masks (B, H, W) bool of previews and scores, each a function of its index alone."""
        size = self.images.height, self.images.width
        return np.stack([draw_mask(row_generator(0, 0, Purpose.MASK, index), *size) for index in indices.tolist()])

    def _preview_indices(self, count: int, seed: int) -> np.ndarray:
        return sample_indices(np.arange(min(count, len(self.images))), len(self.images), seed)

    def _centres(self, indices: np.ndarray) -> torch.Tensor:
        """The images `indices` (B, C, H, W) float32 in [-1, 1], without augmentation."""
        images = to_model_input(to_host_tensor(self.images.gather(indices, None)), self.images)
        return to_training_size(images, (self.images.height, self.images.width))


def interleaved(pictures: np.ndarray, samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Condition, sample and true image (3 N, H, W, C) of each of N."""
    return np.stack([pictures, samples, truth], axis=1).reshape(-1, *samples.shape[1:])


def to_uint8(images: torch.Tensor, channels: int | None = None) -> np.ndarray:
    """(B, H, W, C) uint8 of images (B, C, H, W) in [-1, 1]; with `channels` grey is repeated, and opaque."""
    images = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    channels = channels or images.shape[1]
    if images.shape[1] != channels:
        images = images.expand(-1, min(3, channels), -1, -1)
    if images.shape[1] != channels:
        images = torch.cat([images, torch.full_like(images[:, :1], 255)], dim=1)
    return images.permute(0, 2, 3, 1).numpy()
