"""Decode the conditioning image of a pair: a picture, or a map of class ids, resized and cropped as its image is."""

# H/W target height and width, C channels, h/w of a file, pixels in HWC order

from pathlib import Path

import numpy as np
from PIL import Image

from trainkit.data import faults
from trainkit.data.faults import RejectedImage
from trainkit.data.images.corrections import raw_mode_of
from trainkit.data.images.decode import decode_like, open_image
from trainkit.data.images.geometry import TRANSPOSES, center_box, middle_part, orientation_of, plan_like
from trainkit.data.images.limits import check_header, pillow_limits, rejection
from trainkit.data.pairing import PairSettings
from trainkit.data.settings import PreparationSettings

ID_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")  # of Pillow, with an id per pixel
LOSSY_FORMATS = ("JPEG", "MPO", "JPEG2000", "AVIF")


def decode_pair(
    image: bytes | Path | np.ndarray,
    condition: bytes | Path | np.ndarray | None,
    settings: PreparationSettings,
    pairs: PairSettings,
) -> tuple[np.ndarray, np.ndarray]:
    """Decode an image (H, W, C) and its conditioning image (H, W, _) alike: see `decode_image`.

    Raises `RejectedImage`, with a fault of its own if the conditioning image is missing, broken or of another shape.
    """
    if condition is None:
        raise RejectedImage(faults.NO_CONDITION, "there is no conditioning image for it")
    pixels, size = decode_like(image, settings)
    own = pairs.image_settings(settings)
    try:
        if pairs.classes is not None:
            return pixels, decode_label_map(condition, own, pairs.classes, size)
        return pixels, decode_like(condition, own, size)[0]
    except RejectedImage as error:
        raise faults.of_condition(error, condition.name if isinstance(condition, Path) else "") from None


def decode_label_map(
    image: bytes | Path | np.ndarray, settings: PreparationSettings, classes: int, like: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode a file with a class id per pixel, by nearest neighbour: (H, W, 1) uint8, at most 256 `classes`.

    Ids are grey levels, the entries of a palette, or the whole numbers of an array (h, w, 1); padding has the id 0.
    `like` is as in `decode_like`. Raises `RejectedImage`: no_label_map if the file has colours, was stored with loss,
    or holds an id outside the classes.
    """
    with pillow_limits(settings.max_image_pixels):
        try:
            with _open_map(image) as opened:
                check_header(opened, settings)
                return _resized(opened, settings, classes, like)
        except RejectedImage:
            raise
        except Exception as error:  # Pillow's plugins raise almost anything on a broken file
            raise rejection(image, error) from None


def _open_map(image: bytes | Path | np.ndarray) -> Image.Image:
    """Open a label map without decoding it; ids of an array that no image can hold stay outside all classes."""
    if isinstance(image, np.ndarray) and image.shape[2] == 1 and image.dtype != np.uint8:
        limits = np.iinfo(np.int32)
        return Image.fromarray(image[..., 0].astype(np.int64).clip(limits.min, limits.max).astype(np.int32))
    return open_image(image)


def _resized(
    opened: Image.Image, settings: PreparationSettings, classes: int, like: tuple[int, int] | None
) -> np.ndarray:
    if opened.format in LOSSY_FORMATS:
        raise RejectedImage(faults.NO_LABEL_MAP, f"{opened.format} changes ids: save label maps as PNG")
    if opened.mode not in ID_MODES:
        raise RejectedImage(
            faults.NO_LABEL_MAP,
            f"it has {len(opened.getbands())} channels ({opened.mode}), and a label map has one: save the id of each "
            "pixel as its grey level",
        )
    ids = _ids(opened)
    wrong = ids[(ids < 0) | (ids >= classes)]
    if len(wrong):
        raise RejectedImage(
            faults.NO_LABEL_MAP,
            f"it holds the id {wrong[0]}, and the ids of {classes} classes are 0 to {classes - 1}",
        )
    orientation = orientation_of(opened)
    full_size, part, resized_size = plan_like(opened.size, settings, orientation, like)
    map_ = middle_part(Image.fromarray(ids.astype(np.uint8)), full_size, part)
    map_ = map_.resize(resized_size, Image.Resampling.NEAREST)
    if orientation in TRANSPOSES:
        map_ = map_.transpose(TRANSPOSES[orientation])
    target = (settings.width, settings.height)
    if settings.resize_mode in ("crop", "pad"):
        map_ = map_.crop(center_box(map_.size, target))
    return np.asarray(map_)[..., None]


def _ids(opened: Image.Image) -> np.ndarray:
    """The ids (h, w) int32 of an opened image: Pillow scales grey levels of 2 and 4 bits to 8."""
    raw_mode = raw_mode_of(opened) or ""
    opened.load()
    ids = np.asarray(opened).astype(np.int32)
    if opened.mode == "L" and raw_mode in ("L;2", "L;4"):
        ids //= 255 // (2 ** int(raw_mode[2:]) - 1)
    return ids
