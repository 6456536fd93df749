"""The picture that a visitor uploads for a model that is conditioned on images."""

# h/w height and width of the picture, H/W those of the result

import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from trainkit.app.models import AppModel
from trainkit.data.faults import NO_LABEL_MAP, RejectedImage
from trainkit.data.images.conditions import decode_label_map
from trainkit.data.images.decode import decode_image, image_size
from trainkit.data.settings import PreparationSettings
from trainkit.errors import UserError
from trainkit.sampling.pictures import check_picture, picture_arguments

Upload = str | Path | bytes  # a file, or the content of one
MAX_ENLARGEMENT = 4  # of the area of the images that a model was trained on
NAMES = {
    "downscale": "Small image", "mask": "Image to fill", "grayscale": "Grey image", "edges": "Edges",
    "labels": "Label map",
}  # fmt: skip


def picture_name(model: AppModel) -> str:
    """What to upload for `model`, in a few words."""
    assert model.image_input is not None  # of a model that is conditioned on images
    height, width = model.picture_size
    ids = f", ids 0 to {model.image_input.classes - 1}" if model.image_input.kind == "labels" else ""
    return f"{NAMES.get(model.image_input.kind, 'Image')}, {width}×{height}{ids}"


def read_uploads(
    model: AppModel, picture: Upload, mask: Upload | None, fits: bool
) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
    """The arguments of the pipeline for a picture and its mask, and the size (H, W) of the result.

    With `fits` both are scaled and cropped to the size of training.

    Raises:
        UserError: one of them cannot be used; the message names its field.
    """
    image_input = model.image_input
    assert image_input is not None  # of a model that is conditioned on images
    size = model.picture_size
    if not fits:
        size = _checked("Image", partial(image_size, picture))
        _check_area(model, size)
        if mask is not None and (masked := _checked("Mask", partial(image_size, mask))) != size:
            raise UserError(f"Mask {masked[1]}×{masked[0]}: its image is {size[1]}×{size[0]}; give both one size")
    if mask is None and image_input.kind == "mask" and image_input.channels == 4:
        raise UserError("Mask is empty: the transparency of the picture is part of this model's images")

    def read(field: str, upload: Upload, mode: str) -> np.ndarray:
        settings = PreparationSettings(*size, "crop" if fits else "stretch", mode)
        if image_input.kind == "labels":
            return _checked(field, partial(decode_label_map, _file(upload), settings, image_input.classes))
        return _checked(field, partial(decode_image, upload, settings))

    read_mask = None if mask is None or image_input.kind != "mask" else partial(read, "Mask", mask)
    given = picture_arguments(image_input, partial(read, "Image", picture), read_mask)
    try:
        check_picture(model.pipeline, given)
    except ValueError as error:
        if read_mask is None and str(error).startswith("mask_image"):
            raise UserError("Mask is empty: upload one, white where to generate, or a picture with holes") from None
        raise UserError(re.sub(r"^(mask_)?image", lambda found: "Mask" if found[1] else "Image", str(error))) from None
    return given, (size[0] * image_input.factor, size[1] * image_input.factor)


def read_label_map(model: AppModel, upload: Upload, fits: bool) -> np.ndarray:
    """The ids (H, W) uint8 of a label map as `model` gets them. Raises `UserError` as `read_uploads` does."""
    given, _ = read_uploads(model, upload, None, fits)
    return given["image"][..., 0]


def example_uploads(model: AppModel) -> tuple[bytes, bytes | None]:
    """A grey picture, or a map of id 1, and, if the model needs one, a mask of its upper half, as PNG."""
    assert model.image_input is not None  # of a model that is conditioned on images
    (height, width), is_masked = model.picture_size, model.image_input.kind == "mask"
    grey = 1 if model.image_input.kind == "labels" else 128
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2] = 255
    return _png(np.full((height, width), grey, np.uint8)), _png(mask) if is_masked else None


def _file(upload: Upload) -> Path | bytes:
    return Path(upload) if isinstance(upload, str) else upload


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _check_area(model: AppModel, size: tuple[int, int]) -> None:
    """Refuse a picture whose result would take the others in the queue too long."""
    height, width = model.picture_size
    if size[0] * size[1] > MAX_ENLARGEMENT * height * width:
        raise UserError(
            f"Image {size[1]}×{size[0]}: this model was trained with {width}×{height}; give one of at most "
            f"{MAX_ENLARGEMENT} times as many pixels, or let it be fitted"
        )


def _checked(field: str, function: Callable):
    try:
        return function()
    except RejectedImage as error:
        problem = "no label map that this model can use" if error.fault == NO_LABEL_MAP else "it cannot be read"
        raise UserError(f"{field}: {problem}: {error}") from None
