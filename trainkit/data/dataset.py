"""A prepared dataset, opened by memory map: pixels come straight from the Arrow buffers in the page cache."""

# B batch, H/W target height and width, h/w an image's own, C channels

import bisect
import json
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from trainkit.data.images import PreparationSettings
from trainkit.data.prepare import PREPARATION_NAME, read_preparation
from trainkit.data.shards import open_stream
from trainkit.errors import UserError

NO_LABEL = -1


class _Batch(NamedTuple):
    """One record batch: `columns` are Arrow's, the rest are views of its buffers."""

    columns: pa.RecordBatch
    pixels: np.ndarray  # (rows, H, W, C) of a fixed size, else flat
    offsets: np.ndarray | None  # where each image starts in flat pixels
    heights: np.ndarray | None
    widths: np.ndarray | None


class PreparedImages:
    """The images of a prepared dataset by number, 0 to `len() - 1`. Raises `UserError` where it is not whole.

    Opening reads two small files and looks at the size of each shard; a shard is mapped when first touched.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        preparation = read_preparation(self.folder)
        if preparation is None:
            raise UserError(
                f"{folder} is no complete prepared dataset ({PREPARATION_NAME} is missing or of another run); "
                "run prepare_dataset.py with the same --output_dir again"
            )
        info = json.loads((self.folder / "dataset_info.json").read_text())
        self.settings = PreparationSettings(
            **{**preparation["settings"], "background": tuple(preparation["settings"]["background"])}
        )
        self.fingerprint: str = preparation["fingerprint"]
        self.preparation = preparation
        self.height, self.width = self.settings.height, self.settings.width
        self.channels, self.bit_depth = self.settings.channels, self.settings.bit_depth
        self.image_mode, self.fixed_size = self.settings.image_mode, self.settings.center_crop
        self.label_names: list[str] | None = info["features"].get("label", {}).get("names")
        self.has_text = "text" in info["features"]
        self.vector_length: int | None = info["features"].get("vector", {}).get("length")
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
        return PreparedImages, (self.folder,)

    def gather(self, indices: np.ndarray, crops: np.ndarray | None = None) -> np.ndarray:
        """Copy images out, in the order of `indices` (B,): (B, H, W, C) uint8, or uint16 at 16 bits.

        `crops` (B, 2) in [0, 1) places the target window along height and width in images stored with their own
        aspect; None takes the centre. Images of a fixed size have nothing to crop.
        """
        shape = (len(indices), self.height, self.width, self.channels)
        images = np.empty(shape, dtype=self.settings.dtype)
        if self.fixed_size:
            for position, (batch, row) in enumerate(self._located(indices)):
                images[position] = batch.pixels[row]
            return images
        for position, (batch, row) in enumerate(self._located(indices)):
            height, width = batch.heights[row], batch.widths[row]
            start = batch.offsets[row]
            image = batch.pixels[start : start + height * width * self.channels].reshape(height, width, self.channels)
            if crops is None:
                top, left = round((height - self.height) / 2), round((width - self.width) / 2)
            else:
                top = int(crops[position, 0] * (height - self.height + 1))
                left = int(crops[position, 1] * (width - self.width + 1))
            images[position] = image[top : top + self.height, left : left + self.width]
        return images

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Class numbers (B,) int64 into `label_names`; -1 where an image's class is not known."""
        if self.label_names is None:
            return np.full(len(indices), NO_LABEL, dtype=np.int64)
        return np.array(self._values("label", indices), dtype=np.int64)

    def texts(self, indices: np.ndarray) -> list[str]:
        """Captions; an empty one where an image has none."""
        return [text or "" for text in self._values("text", indices)] if self.has_text else [""] * len(indices)

    def vectors(self, indices: np.ndarray) -> np.ndarray:
        """Vectors (B, D) float32, those stored beside the images; D is 0 where there are none."""
        length = self.vector_length or 0
        vectors = np.empty((len(indices), length), dtype=np.float32)
        for position, (batch, row) in enumerate(self._located(indices) if length else ()):
            numbers = batch.columns.column("vector").values.to_numpy()
            vectors[position] = numbers[row * length : (row + 1) * length]
        return vectors

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
        pixels = np.frombuffer(images.values.buffers()[1], dtype=self.settings.dtype)
        if self.fixed_size:
            pixels = pixels.reshape(batch.num_rows, self.height, self.width, self.channels)
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
