"""Images with 16 bits per channel, in float32 throughout: Pillow has no 16-bit colour mode."""

# H/W target height and width, C channels, samples in HWC order

from collections.abc import Callable

import numpy as np
from PIL import Image

from trainkit.data.images.colour import DEEP_MODES, seen_samples, standard_mode, unit_samples
from trainkit.data.images.corrections import both_bytes, load_corrected, raw_mode_of
from trainkit.data.images.geometry import TRANSPOSES, center_box, middle_part, orientation_of, plan_like, shown_size
from trainkit.data.settings import PreparationSettings

DEEP_COLOUR = {f"{mode};16{order}" for mode in ("RGB", "RGBX", "RGBA") for order in "LBN"}  # Pillow's raw modes


def decode_16bit(
    image: Image.Image,
    open_again: Callable[[], Image.Image],
    settings: PreparationSettings,
    samples: np.ndarray | None = None,
    like: tuple[int, int] | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the target (H, W, C) uint16 of an opened image, and its size; `open_again` opens it a second time.

    `samples` are its pixels in [0, 1] if they are already known. `like` and the size are as in `decode_like`.
    """
    raw_mode = raw_mode_of(image)
    image, colour = load_corrected(image, open_again)
    orientation = orientation_of(image)
    if samples is None and colour is not None:
        samples = colour / np.float32(65535)
    elif samples is None:
        samples = _deep_samples(image, raw_mode, open_again)  # (H, W, 1, 3 or 4) in [0, 1]
    target = (settings.width, settings.height)
    has_alpha = samples.shape[2] == 4
    if has_alpha:
        samples[..., :3] *= samples[..., 3:]
    full_size, part, resized_size = plan_like(image.size, settings, orientation, like)
    planes = [Image.fromarray(np.ascontiguousarray(samples[..., channel])) for channel in range(samples.shape[2])]
    planes = [middle_part(plane, full_size, part) for plane in planes]
    planes = [plane.resize(resized_size, Image.Resampling.BILINEAR, reducing_gap=3.0) for plane in planes]
    if orientation in TRANSPOSES:
        planes = [plane.transpose(TRANSPOSES[orientation]) for plane in planes]
    if settings.resize_mode == "crop":
        planes = [plane.crop(center_box(plane.size, target)) for plane in planes]
    samples = np.stack([np.asarray(plane) for plane in planes], axis=2)
    background = np.array(settings.background, dtype=np.float32) / 255
    if has_alpha:
        color, alpha = samples[..., :3], samples[..., 3:]
        if settings.image_mode == "RGBA":
            samples = np.concatenate([color / np.maximum(alpha, 1e-6), alpha], axis=2)
        else:
            samples = color + (1 - alpha) * background
    samples = _to_channels(samples, settings.image_mode)
    if settings.resize_mode == "pad" and samples.shape[:2] != (settings.height, settings.width):
        around = (
            np.zeros(4) if settings.image_mode == "RGBA" else _to_channels(background[None, None], settings.image_mode)
        )
        canvas = np.broadcast_to(around, (settings.height, settings.width, settings.channels)).astype(np.float32)
        left, top, right, bottom = center_box(target, samples.shape[1::-1])
        canvas[top:bottom, left:right] = samples
        samples = canvas
    return np.rint(np.clip(samples, 0, 1) * 65535).astype(np.uint16), shown_size(full_size, orientation)


def unit_array(array: np.ndarray) -> np.ndarray:
    """Return the samples of an array scaled to [0, 1] by the range of its type, float32."""
    full = np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1
    return array.astype(np.float32) / np.float32(full)


def _deep_samples(image: Image.Image, raw_mode: str | None, open_again: Callable[[], Image.Image]) -> np.ndarray:
    """Return the samples (H, W, C) of a loaded image in [0, 1], at the file's precision where Pillow can read it."""
    if image.mode in DEEP_MODES:
        grey, seen = unit_samples(image)[..., None], seen_samples(image)
        return grey if seen is None else np.concatenate([grey, grey, grey, seen[..., None]], axis=2, dtype=np.float32)
    if raw_mode in DEEP_COLOUR:
        return both_bytes(raw_mode, open_again) / np.float32(65535)
    standard = standard_mode(image, "RGB")
    samples = np.asarray(standard).reshape(image.height, image.width, -1)
    return samples / np.float32(255)


def _to_channels(samples: np.ndarray, image_mode: str) -> np.ndarray:
    channels = samples.shape[2]
    if image_mode == "L":
        weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as Pillow's convert("L")
        return samples if channels == 1 else (samples[..., :3] @ weights)[..., None]
    color = np.repeat(samples, 3, axis=2) if channels == 1 else samples
    if image_mode == "RGBA" and color.shape[2] == 3:
        return np.concatenate([color, np.ones_like(color[..., :1])], axis=2)
    return color
