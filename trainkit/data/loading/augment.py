"""Augmentation on the device: all geometry of an image in one resampling, all colour in one product.

Each image has one affine matrix and one colour matrix, so that the cost does not grow with the number of augmentations
(as in Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", appendix B, and Karras et al.
2022, "Elucidating the Design Space of Diffusion-Based Generative Models", appendix F.2). Nothing is computed by a
matrix product of the device, which may round to TF32 or choose another kernel for another batch size: an image comes
out the same in any batch.

B batch, C channels, H/W height and width that are trained on, h/w those of the stored window.
"""

import torch
from torch.nn import functional

from trainkit.data.loading.augment_draws import Augmentation, Parameters
from trainkit.errors import UserError


def build_augmentation(options, channels: int) -> Augmentation | None:
    """Return the augmentation of `AugmentationOptions` for images of `channels`; None if it is `--random_flip` alone.

    Raises `UserError` as `check_augmentation`.
    """
    check_augmentation(options, grey=channels == 1)
    augmentation = Augmentation(
        rotation=options.random_rotation,
        translation=options.random_translation,
        scale=options.random_scale,
        crop_area=None if options.random_resized_crop is None else tuple(options.random_resized_crop),
        crop_aspect=tuple(options.random_resized_crop_aspect),
        brightness=options.random_brightness,
        contrast=options.random_contrast,
        saturation=options.random_saturation,
        hue=options.random_hue,
        probability=options.augmentation_probability,
        with_labels=options.augmentation_conditioning,
    )
    return augmentation if augmentation.moves or augmentation.recolours or augmentation.with_labels else None


def check_augmentation(options, grey: bool) -> None:
    """Raise `UserError` for a value out of range, or for an augmentation that has no effect on `grey` images."""
    for name, largest, unit in (
        ("random_rotation", 180, "degrees"),
        ("random_translation", 1, "of width and height"),
        ("random_scale", 4, "(1 zooms out to half and in to twice the size)"),
        ("random_brightness", 1, "of the range from black to white"),
        ("random_contrast", 1, "(the factor is 1 - X to 1 + X)"),
        ("random_saturation", 1, "(the factor is 1 - X to 1 + X)"),
        ("random_hue", 180, "degrees"),
    ):
        value = getattr(options, name)
        if not 0 <= value <= largest:
            raise UserError(f"--{name} {value:g} must be between 0 and {largest} {unit}")
    if not 0 < options.augmentation_probability <= 1:
        raise UserError(
            f"--augmentation_probability {options.augmentation_probability:g} must be above 0 and at most 1"
        )
    if options.random_resized_crop is not None:
        _check_range("random_resized_crop", options.random_resized_crop, "areas", 1, "0.5 1")
        _check_range("random_resized_crop_aspect", options.random_resized_crop_aspect, "ratios", 10, "0.75 1.33")
    for name in ("random_saturation", "random_hue"):
        if grey and getattr(options, name):
            raise UserError(f"--{name} {getattr(options, name):g} changes nothing in grey images: leave it out")
    if options.augmentation_conditioning and not (
        options.random_flip or options.random_resized_crop or any(_strengths(options))
    ):
        raise UserError("--augmentation_conditioning needs an augmentation, for example --random_rotation 10")


def _strengths(options) -> list[float]:
    names = ("rotation", "translation", "scale", "brightness", "contrast", "saturation", "hue")
    return [getattr(options, f"random_{name}") for name in names]


def _check_range(name: str, values: list[float], what: str, largest: float, example: str) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= largest:
        given = " ".join(f"{value:g}" for value in values)
        raise UserError(
            f"--{name} {given} must be two {what}, the smallest and the largest, above 0 and at most {largest}: "
            f"for example {example}"
        )


def augment(
    images: torch.Tensor, parameters: Parameters | None, output_size: tuple[int, int], nearest: bool = False
) -> torch.Tensor:
    """Return images (B, C, *output_size) float32 in [-1, 1] from stored windows `images` (B, C, h, w) of that range.

    Areas outside the window are filled by reflection. If the geometry shrinks by more than 1.5, every pixel is the
    mean of several samples. Colours are clipped to the range. An alpha channel keeps its values; images of one channel
    change in brightness and contrast only. Unchanged images equal those of `to_training_size` bit for bit. With
    `nearest` values are taken and never mixed, as label maps need it.
    """
    if parameters is None or parameters.geometry is None:
        images = to_training_size(images, output_size, nearest)
    else:
        moved = _move(images, parameters.geometry, output_size, 1 if nearest else parameters.oversampling, nearest)
        if parameters.untouched is not None:
            still = to_training_size(images, output_size, nearest)
            moved = torch.where(parameters.untouched[:, None, None, None], still, moved)
        images = moved
    if parameters is not None and parameters.colour is not None:
        images = _recolour(images, parameters.colour)
    return images


def to_training_size(images: torch.Tensor, size: tuple[int, int], nearest: bool = False) -> torch.Tensor:
    """Shrink `images` (B, C, H, W) from the stored to the training `size` (height, width), antialiased bilinear.

    `nearest` takes the nearest pixel instead.
    """
    if images.shape[-2:] == size:
        return images
    if nearest:
        return functional.interpolate(images, size, mode="nearest-exact")
    return functional.interpolate(images, size, mode="bilinear", antialias=True)


def _move(
    images: torch.Tensor, matrices: torch.Tensor, size: tuple[int, int], oversampling: int, nearest: bool
) -> torch.Tensor:
    height, width = size[0] * oversampling, size[1] * oversampling
    x = _pixel_centres(width, images.device)
    y = _pixel_centres(height, images.device)[:, None]
    grid = images.new_empty(len(images), height, width, 2)
    for axis in range(2):
        to_x, to_y, origin = (matrices[:, axis, column, None, None] for column in range(3))
        torch.add(to_x * x, to_y * y + origin, out=grid[..., axis])
    mode = "nearest" if nearest else "bilinear"
    moved = functional.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False)
    return moved if oversampling == 1 else functional.avg_pool2d(moved, oversampling)


def _pixel_centres(count: int, device: torch.device) -> torch.Tensor:
    """Return the pixel centres (count,) on a scale from -1 to 1, the outer edges of the first and last pixel."""
    return (2 * torch.arange(count, device=device, dtype=torch.float32) + 1) / count - 1


def _recolour(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    coloured = 1 if images.shape[1] == 1 else 3
    matrices = matrices[:, :coloured, :, None, None]
    changed = torch.addcmul(matrices[:, :, 3], matrices[:, :, 0], images[:, :1])
    for channel in range(1, coloured):
        changed.addcmul_(matrices[:, :, channel], images[:, channel : channel + 1])
    changed.clamp_(-1, 1)
    return changed if coloured == images.shape[1] else torch.cat([changed, images[:, coloured:]], dim=1)
