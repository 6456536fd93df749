"""The conditioning images of a prepared dataset of pairs, stored in the rows of their images."""

# B batch, C channels, H/W height and width of the stored window, h/w of a single image

import colorsys
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from trainkit.data.files import RemotePath
from trainkit.data.format import CONDITION_COLUMN
from trainkit.data.images.storage import decode
from trainkit.data.loading.dataset import PreparedImages, window_of
from trainkit.data.loading.mapped_memory import will_need


class ConditioningImages:
    """The conditioning image of each of `images`, by the number of that image. `images` must have pairs."""

    def __init__(self, images: PreparedImages):
        assert images.pairs is not None
        self.images, self.pairs = images, images.pairs
        self.settings = images.pairs.image_settings(images.settings)
        self.size = images.height, images.width  # in training

    @property
    def are_label_maps(self) -> bool:
        return self.pairs.classes is not None

    def gather(self, indices: np.ndarray, crops: np.ndarray | None = None) -> np.ndarray:
        """Copy conditioning images in the order of `indices` (B,): (B, H, W, C) uint8, or uint16 at 16 bits.

        `crops` (B, 2) are those of the images: see `PreparedImages.gather`. Of label maps these are the ids, C is 1.
        """
        height, width = self.images.stored_height, self.images.stored_width
        found = np.empty((len(indices), height, width, self.pairs.channels), dtype=self.settings.dtype)
        for position, (batch, row) in enumerate(self.images.located(indices)):
            crop = None if crops is None or self.images.fixed_size else crops[position]
            found[position] = window_of(self._whole(batch.columns, row), height, width, crop)
        return found

    def shown(self, indices: np.ndarray) -> np.ndarray:
        """Return the centres of conditioning images (B, H, W, C) uint8 for people: label maps in colours."""
        found = self.gather(indices)
        if self.pairs.classes is not None:
            return label_colours(self.pairs.classes)[found[..., 0]]
        return (found >> 8).astype(np.uint8) if found.dtype == np.uint16 else found

    def read_soon(self, indices: np.ndarray) -> None:
        """Start to read the conditioning images of `indices` (B,), without waiting: see `PreparedImages.read_soon`."""
        if not isinstance(self.images.folder, RemotePath):
            will_need(self._memory(batch.columns, row, row + 1) for batch, row in self.images.located(indices))

    def read_ahead(self, ranges: list[tuple[int, int]]) -> None:
        """Start to read those of `ranges` (first, end). Shards at a URL are fetched whole, with their images."""
        if not isinstance(self.images.folder, RemotePath):
            for first, end in ranges:
                will_need(self._memory(batch.columns, *rows) for batch, *rows in self.images.parts(first, end))

    def _whole(self, columns: pa.RecordBatch, row: int) -> np.ndarray:
        """Return the conditioning image (h, w, C) in a row."""
        column = columns.column(CONDITION_COLUMN)
        if self.settings.storage != "pixels":
            return decode(column.field("bytes")[row].as_py(), self.settings)
        values = np.frombuffer(column.values.buffers()[1], dtype=self.settings.dtype)
        start, end = self._bounds(column, row, row + 1)
        height, width = self.images.stored_height, self.images.stored_width
        if not self.images.fixed_size:
            height, width = (columns.column(name)[row].as_py() for name in ("height", "width"))
        return values[start:end].reshape(height, width, self.pairs.channels)

    def _memory(self, columns: pa.RecordBatch, first: int, end: int) -> tuple[int, int]:
        """Return where rows `first` to `end` - 1 are in memory: address and number of bytes."""
        column, width = columns.column(CONDITION_COLUMN), self.settings.dtype.itemsize
        if self.settings.storage != "pixels":
            column = column.field("bytes")
            offsets = np.frombuffer(column.buffers()[1], dtype=np.int32)
            start, stop, buffer, width = int(offsets[first]), int(offsets[end]), column.buffers()[2], 1
        else:
            (start, stop), buffer = self._bounds(column, first, end), column.values.buffers()[1]
        return buffer.address + start * width, (stop - start) * width

    def _bounds(self, column: pa.Array, first: int, end: int) -> tuple[int, int]:
        """Return the first sample of row `first` and the end of row `end` - 1, of a column of pixels."""
        if self.images.fixed_size:
            return first * column.type.list_size, end * column.type.list_size
        return column.offsets[first].as_py(), column.offsets[end].as_py()


class PixelsOfLatents:
    """The pixels of images that are trained on as latents: second images are made from them.

    It has the members of ConditioningImages that training uses.
    """

    are_label_maps = False

    def __init__(self, images: PreparedImages):
        self.images, self.settings, self.size = images, images.settings, (images.height, images.width)
        self.gather, self.read_soon, self.read_ahead = images.gather, images.read_soon, images.read_ahead


SecondImages: TypeAlias = ConditioningImages | PixelsOfLatents


def label_colours(classes: int) -> np.ndarray:
    """Return colours (N, 3) uint8 to show label maps in: black for id 0, the others around the colour circle."""
    colours = [(0.0, 0.0, 0.0), *(colorsys.hsv_to_rgb(n / (classes - 1), 0.75, 0.95) for n in range(classes - 1))]
    return np.round(np.array(colours) * 255).astype(np.uint8)


def with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Return `images` (B, H, W, _) uint8 with 3 or 4 `channels`: grey is repeated, and alpha is opaque or left out."""
    if images.shape[-1] == channels:
        return images
    colour = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images[..., :3]
    return colour if channels == 3 else np.concatenate([colour, np.full_like(colour[..., :1], 255)], axis=-1)


def side_by_side(*images: np.ndarray) -> list[np.ndarray]:
    """Return pictures of several kinds, each (B, H, W, _) uint8, with the channels that the richest of them has."""
    channels = max(each.shape[-1] for each in images)
    return [with_channels(each, channels) for each in images]
