"""Random augmentation parameters, drawn on the host: an affine matrix, a colour matrix and labels for each image.

Draws are pure functions of (seed, step, row of the global batch), so neither the distribution of the batch over
processes nor a resume changes an image. Only the matrices are copied to the device.

B batch, H/W height and width of training images, h/w of the stored window.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from trainkit.data.loading.order import Purpose, uniform_draws
from trainkit.data.loading.transfer import to_device

# Maximum distance of two samples in stored pixels. Bilinear interpolation skips pixels above 1, but the aliasing is
# negligible below 1.5.
MAX_SPACING = 1.5
LABELS = 15  # numbers that describe the augmentation of an image to a network; see `_labels`


@dataclass(frozen=True)
class Augmentation:
    """Augmentations besides `--random_flip`; every strength is the maximum that is drawn, and 0 means none."""

    rotation: float = 0.0  # degrees
    translation: float = 0.0  # of width and height
    scale: float = 0.0  # zoom by 1 / (1 + scale) to 1 + scale, log-uniform
    crop_area: tuple[float, float] | None = None  # of the stored window
    crop_aspect: tuple[float, float] = (1.0, 1.0)  # width to height, relative to the window's; log-uniform
    brightness: float = 0.0  # added, of the range from black to white
    contrast: float = 0.0  # factor 1 - contrast to 1 + contrast of the distance from mid-grey
    saturation: float = 0.0  # factor 1 - saturation to 1 + saturation of the distance from a pixel's own grey
    hue: float = 0.0  # degrees
    probability: float = 1.0
    with_labels: bool = False

    @property
    def moves(self) -> bool:
        """Whether images are resampled."""
        return any((self.rotation, self.translation, self.scale, self.crop_area))

    @property
    def recolours(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation, self.hue))


@dataclass(frozen=True)
class Parameters:
    """The augmentation of each image of a batch."""

    geometry: torch.Tensor | None  # (B, 2, 3) float32, from positions in the image to positions in the window, -1 .. 1
    colour: torch.Tensor | None  # (B, 4, 4) float32, acts on (r, g, b, 1) in [-1, 1]
    labels: torch.Tensor | None  # (B, LABELS) float32, zero for an unchanged image
    untouched: torch.Tensor | None  # (B,) bool, where the geometry is the identity; None if all images are moved
    oversampling: int  # samples averaged along each side of a pixel

    def to(self, device: torch.device) -> "Parameters":
        return self._each(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> "Parameters":
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Parameters":
        tensors = {name: getattr(self, name) for name in ("geometry", "colour", "labels", "untouched")}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **changed)


def draw_parameters(
    augmentation: Augmentation,
    seed: int,
    step: int,
    global_size: int,
    rows: slice,
    size: tuple[int, int],
    window: tuple[int, int],
    flipped: np.ndarray | None,
) -> Parameters:
    """Draw the augmentation of `rows` of the global batch of optimizer step `step`.

    `size` (H, W) is the training size and `window` (h, w) the stored one. `flipped` (B,) bool marks mirrored images;
    the matrices contain the flips only if images are also moved in other ways.
    """
    draws = _Draws(augmentation.probability, seed, step, global_size, rows)
    turn = np.radians(augmentation.rotation) * draws.signed(Purpose.ROTATION, augmentation.rotation)
    across, down = draws.signed_pair(Purpose.TRANSLATION_X, Purpose.TRANSLATION_Y, augmentation.translation)
    zoom = draws.signed(Purpose.SCALE, augmentation.scale)
    crop = _draw_crop(augmentation, draws)
    brightness = draws.signed(Purpose.BRIGHTNESS, augmentation.brightness)
    contrast = draws.signed(Purpose.CONTRAST, augmentation.contrast)
    saturation = draws.signed(Purpose.SATURATION, augmentation.saturation)
    hue = np.radians(augmentation.hue) * draws.signed(Purpose.HUE, augmentation.hue)
    flipped = np.zeros(draws.count, dtype=bool) if flipped is None else flipped

    geometry = colour = labels = untouched = None
    if augmentation.moves:
        shift = augmentation.translation * np.stack([across, down], axis=1)
        geometry = affine_matrices(size, flipped, (1 + augmentation.scale) ** zoom, turn, shift, crop)
        whole = (geometry == np.eye(2, 3)).all(axis=(1, 2))
        untouched = torch.from_numpy(whole) if whole.any() else None
    if augmentation.recolours:
        colour = colour_matrices(
            2 * augmentation.brightness * brightness,  # the range from black to white is 2
            1 + augmentation.contrast * contrast,
            1 + augmentation.saturation * saturation,
            hue,
        )
    if augmentation.with_labels:
        labels = _labels(flipped, turn, across, down, zoom, crop, brightness, contrast, saturation, hue)
    oversampling = _oversampling(augmentation, size, window)
    return Parameters(_tensor(geometry), _tensor(colour), _tensor(labels), untouched, oversampling)


def _tensor(values: np.ndarray | None) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values.astype(np.float32))


class _Draws:
    """The draws of some rows of a global batch; one number per row decides if a kind is applied and how strongly."""

    def __init__(self, probability: float, seed: int, step: int, global_size: int, rows: slice):
        self.probability, self.seed, self.step, self.global_size, self.rows = (
            probability,
            seed,
            step,
            global_size,
            rows,
        )
        self.count = len(range(*rows.indices(global_size)))

    def uniform(self, purpose: Purpose) -> np.ndarray:
        """(B,) in [0, 1)."""
        return uniform_draws(self.seed, self.step, purpose, self.global_size)[self.rows]

    def applied(self, purpose: Purpose) -> tuple[np.ndarray, np.ndarray]:
        """Return whether the kind is applied (B,) bool, and a number (B,) that is uniform in [0, 1) where it is."""
        drawn = self.uniform(purpose)
        return drawn < self.probability, drawn / self.probability

    def signed(self, purpose: Purpose, strength: float) -> np.ndarray:
        """(B,) in [-1, 1), 0 where the kind is not applied."""
        if not strength:
            return np.zeros(self.count)
        applied, drawn = self.applied(purpose)
        return np.where(applied, 2 * drawn - 1, 0.0)

    def signed_pair(self, first: Purpose, second: Purpose, strength: float) -> tuple[np.ndarray, np.ndarray]:
        """Return two signed draws that are applied together."""
        if not strength:
            return np.zeros(self.count), np.zeros(self.count)
        applied, drawn = self.applied(first)
        return np.where(applied, 2 * drawn - 1, 0.0), np.where(applied, 2 * self.uniform(second) - 1, 0.0)


def _draw_crop(augmentation: Augmentation, draws: _Draws) -> np.ndarray:
    """Return (B, 4): width and height of the crop relative to the window, and its centre, -1 .. 1 in the window.

    A crop whose aspect ratio makes it wider or higher than the window shrinks to fit at that ratio.
    """
    whole = np.tile([1.0, 1.0, 0.0, 0.0], (draws.count, 1))
    if augmentation.crop_area is None:
        return whole
    applied, drawn = draws.applied(Purpose.RESIZED_CROP_AREA)
    smallest, largest = augmentation.crop_area
    area = smallest + (largest - smallest) * drawn
    narrowest, widest = np.log(augmentation.crop_aspect)
    aspect = np.exp(narrowest + (widest - narrowest) * draws.uniform(Purpose.RESIZED_CROP_ASPECT))
    sides = np.sqrt(np.stack([area * aspect, area / aspect], axis=1))
    sides = sides / np.maximum(1, sides.max(axis=1, keepdims=True))
    places = np.stack([draws.uniform(p) for p in (Purpose.RESIZED_CROP_LEFT, Purpose.RESIZED_CROP_TOP)], axis=1)
    return np.where(applied[:, None], np.concatenate([sides, (2 * places - 1) * (1 - sides)], axis=1), whole)


def affine_matrices(
    size: tuple[int, int], flipped: np.ndarray, zoom: np.ndarray, turn: np.ndarray, shift: np.ndarray, crop: np.ndarray
) -> np.ndarray:
    """Return (B, 2, 3) from positions (x, y, 1) in the new image to positions in the window, both -1 .. 1.

    The image appears cropped, mirrored, zoomed, rotated by `turn` radians anticlockwise, and then moved by `shift`
    (B, 2), in fractions of its width to the right and of its height down. `size` (H, W): rotation and zoom keep shapes
    in its pixels. `crop` is as in `_draw_crop`. Exactly the identity for unchanged images.
    """
    height, width = size
    cos, sin, mirror = np.cos(turn) / zoom, np.sin(turn) / zoom, np.where(flipped, -1.0, 1.0)
    inverse = np.stack([mirror * cos, -mirror * sin * height / width, sin * width / height, cos], axis=1)
    inverse = inverse.reshape(-1, 2, 2)
    origin = -(inverse @ (2 * shift[:, :, None]))
    return np.concatenate([inverse, origin], axis=2) * crop[:, :2, None] + _last_column(crop[:, 2:])


def _last_column(values: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((len(values), 2, 2)), values[:, :, None]], axis=2)


def colour_matrices(
    brightness: np.ndarray, contrast: np.ndarray, saturation: np.ndarray, hue: np.ndarray
) -> np.ndarray:
    """Return (B, 4, 4) that act on (r, g, b, 1), where 0 is mid-grey.

    `brightness` is added. Then colours are multiplied by `contrast`, rotated by `hue` radians about the axis of greys,
    and multiplied by `saturation` across that axis.

    The grey of a pixel is the mean of its channels. (Karras et al. 2020, appendix B)
    """
    count = len(contrast)
    grey = np.full((3, 3), 1 / 3)
    quarter_turn = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    cos, sin = np.cos(hue)[:, None, None], np.sin(hue)[:, None, None]
    across = saturation[:, None, None] * (cos * (np.eye(3) - grey) + sin * quarter_turn)  # Rodrigues' formula
    matrices = np.zeros((count, 4, 4))
    matrices[:, :3, :3] = contrast[:, None, None] * (grey + across)
    matrices[:, :3, 3] = (contrast * brightness)[:, None]
    matrices[:, 3, 3] = 1
    return matrices


def _labels(flipped, turn, across, down, zoom, crop, brightness, contrast, saturation, hue) -> np.ndarray:
    """Return (B, LABELS): numbers of about unit size, angles as (cos - 1, sin), all zero for an unchanged image."""
    angles = [part for angle in (turn, hue) for part in (np.cos(angle) - 1, np.sin(angle))]
    crops = [np.log2(crop[:, 0]), np.log2(crop[:, 1]), crop[:, 2], crop[:, 3]]
    return np.stack([flipped, *angles, across, down, zoom, *crops, brightness, contrast, saturation], axis=1)


def _oversampling(augmentation: Augmentation, size: tuple[int, int], window: tuple[int, int]) -> int:
    """Return the samples that the strongest possible shrinking needs, so that they do not depend on the batch."""
    shrinking = max(window[0] / size[0], window[1] / size[1]) * (1 + augmentation.scale)
    return max(1, int(np.ceil(shrinking / MAX_SPACING)))
