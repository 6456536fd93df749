"""A prepared dataset, opened by memory map: pixels come straight from the Arrow buffers in the page cache."""

# B batch, H/W height and width of the stored window, h/w an image's own, C channels

import bisect
import json
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from trainkit.data.prepare import FORMAT, PREPARATION_NAME, read_preparation
from trainkit.data.settings import PreparationSettings
from trainkit.data.shards import open_stream
from trainkit.data.storage import decode
from trainkit.errors import UserError

NO_LABEL = -1


class _Batch(NamedTuple):
    """One record batch: `columns` are Arrow's, the rest are views of its buffers."""

    columns: pa.RecordBatch
    pixels: np.ndarray  # (rows, H, W, C) of a fixed size, else flat; the bytes of encoded images, flat
    offsets: list[int] | None  # where each image starts in what is flat, and where the last one ends
    heights: list[int] | None  # of flat pixels
    widths: list[int] | None


class PreparedImages:
    """The images of a prepared dataset by number, 0 to `len() - 1`. Raises `UserError` where it is not whole.

    Opening reads two small files and looks at the size of each shard; a shard is mapped when first touched.
    `stored_height` and `stored_width` are those of what `gather` gives, `height` and `width` those of training (its
    `resolution`), which are smaller where the dataset was prepared so.
    """

    def __init__(self, folder: str | Path, resolution: tuple[int, int] | None = None):
        self.folder = Path(folder)
        preparation = read_preparation(self.folder)
        if preparation is None:
            raise UserError(
                f"{folder} is no complete prepared dataset ({PREPARATION_NAME} is missing or of another run); "
                "run prepare_dataset.py with the same --output_dir again"
            )
        if preparation["format"] != FORMAT:
            raise UserError(f"{folder} was prepared by another version of these scripts; prepare the images again")
        info = json.loads((self.folder / "dataset_info.json").read_text())
        self.settings = PreparationSettings(
            **{**preparation["settings"], "background": tuple(preparation["settings"]["background"])}
        )
        self.fingerprint: str = preparation["fingerprint"]
        self.preparation = preparation
        self.stored_height, self.stored_width = self.settings.height, self.settings.width
        self.height = self.settings.train_height or self.stored_height
        self.width = self.settings.train_width or self.stored_width
        if resolution is not None:
            self.height, self.width = resolution
        self.channels, self.bit_depth = self.settings.channels, self.settings.bit_depth
        self.image_mode, self.fixed_size = self.settings.image_mode, self.settings.fixed_size
        self.label_names: list[str] | None = info["features"].get("label", {}).get("names")
        self.has_text = "text" in info["features"]
        self._shards = [shard for shard in preparation["shards"] if shard["num_rows"]]
        for shard in self._shards:
            self._check_size(shard)
        self._shard_starts = np.cumsum([0] + [shard["num_rows"] for shard in self._shards]).tolist()
        self._batches: dict[int, _Batch] = {}  # first row -> batch, of the shards touched so far
        self._batch_starts: list[int] = []  # sorted
        self._opened: set[int] = set()
        self._opening = threading.Lock()  # loaders gather from several threads

    def __len__(self) -> int:
        return self._shard_starts[-1]

    def __reduce__(self):  # another process maps the files itself
        return PreparedImages, (self.folder, (self.height, self.width))

    def gather(self, indices: np.ndarray, crops: np.ndarray | None = None) -> np.ndarray:
        """Copy images out, in the order of `indices` (B,): (B, H, W, C) uint8, or uint16 at 16 bits.

        `crops` (B, 2) in [0, 1) places the stored window along height and width in images stored with their own
        aspect; None takes the centre. Images of a fixed size have nothing to crop. Encoded ones are decoded here, so
        that the threads that gather decode side by side.
        """
        height, width = self.stored_height, self.stored_width
        images = np.empty((len(indices), height, width, self.channels), dtype=self.settings.dtype)
        if self.fixed_size and self.settings.storage == "pixels":
            for position, (batch, row) in enumerate(self._located(indices)):
                images[position] = batch.pixels[row]
            return images
        for position, (batch, row) in enumerate(self._located(indices)):
            image = self._whole_image(batch, row)
            if crops is None:
                top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
            else:
                top = int(crops[position, 0] * (image.shape[0] - height + 1))
                left = int(crops[position, 1] * (image.shape[1] - width + 1))
            images[position] = image[top : top + height, left : left + width]
        return images

    def _whole_image(self, batch: _Batch, row: int) -> np.ndarray:
        """(h, w, C), of the image's own size."""
        flat = batch.pixels[batch.offsets[row] : batch.offsets[row + 1]]
        if self.settings.storage != "pixels":
            return decode(flat.tobytes(), self.settings)
        return flat.reshape(batch.heights[row], batch.widths[row], self.channels)

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Class numbers (B,) int64 into `label_names`; -1 where an image's class is not known."""
        if self.label_names is None:
            return np.full(len(indices), NO_LABEL, dtype=np.int64)
        return np.array(self._values("label", indices), dtype=np.int64)

    def texts(self, indices: np.ndarray) -> list[str]:
        """Captions; an empty one where an image has none."""
        return [text or "" for text in self._values("text", indices)] if self.has_text else [""] * len(indices)

    def sources(self, indices: np.ndarray) -> list[str]:
        """Where each image came from: its path in the source folder, or its row."""
        return self._values("source", indices)

    def _values(self, column: str, indices: np.ndarray) -> list:
        return [batch.columns.column(column)[row].as_py() for batch, row in self._located(indices)]

    def _located(self, indices: np.ndarray) -> list[tuple[_Batch, int]]:
        """For each index its batch and the row in it."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"image {indices.min()} to {indices.max()} of {len(self)}")
        shards = np.searchsorted(self._shard_starts, indices, side="right") - 1
        if not self._opened.issuperset(shards.tolist()):
            with self._opening:
                for number in set(shards.tolist()) - self._opened:
                    self._open_shard(number)
        starts = self._batch_starts
        located = []
        for index in indices.tolist():
            start = starts[bisect.bisect_right(starts, index) - 1]
            located.append((self._batches[start], index - start))
        return located

    def _open_shard(self, number: int) -> None:
        shard, start = self._shards[number], self._shard_starts[number]
        path = self.folder / shard["filename"]
        self._check_size(shard)
        try:
            batches = list(open_stream(path))
        except (OSError, pa.ArrowException) as error:
            raise self._broken(path, " ".join(str(error).split())) from None
        if sum(batch.num_rows for batch in batches) != shard["num_rows"]:
            raise self._broken(path, f"it should hold {shard['num_rows']} images")
        for batch in batches:
            self._batches[start] = self._views(batch)
            bisect.insort(self._batch_starts, start)
            start += batch.num_rows
        self._opened.add(number)

    def _views(self, batch: pa.RecordBatch) -> _Batch:
        images = batch.column("image")
        if self.settings.storage != "pixels":
            encoded = images.field("bytes")
            content = np.frombuffer(encoded.buffers()[2], dtype=np.uint8)
            return _Batch(batch, content, np.frombuffer(encoded.buffers()[1], dtype=np.int32).tolist(), None, None)
        pixels = np.frombuffer(images.values.buffers()[1], dtype=self.settings.dtype)
        if self.fixed_size:
            pixels = pixels.reshape(batch.num_rows, self.stored_height, self.stored_width, self.channels)
            return _Batch(batch, pixels, None, None, None)
        offsets, heights, widths = (
            column.to_numpy().astype(np.int64).tolist()
            for column in (images.offsets, batch.column("height"), batch.column("width"))
        )
        return _Batch(batch, pixels, offsets, heights, widths)

    def _check_size(self, shard: dict) -> None:
        path = self.folder / shard["filename"]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise self._broken(path, error.strerror) from None
        if size != shard["num_bytes"]:
            raise self._broken(path, f"{size} bytes instead of {shard['num_bytes']}")

    def _broken(self, path: Path, reason: str) -> UserError:
        return UserError(f"{path} is damaged ({reason}); delete it and run the preparation again: only it is redone")
