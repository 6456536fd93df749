"""A prepared dataset, opened by memory map: pixels are read directly from Arrow buffers in the page cache."""

# B batch, H/W height and width of the stored window, h/w of a single image, C channels

import bisect
import contextlib
import errno
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from trainkit.data.files import RemotePath, location, open_stream, read_text, size, sizes
from trainkit.data.format import FORMAT, NO_LABEL, PREPARATION_NAME, read_preparation
from trainkit.data.images.storage import decode
from trainkit.data.loading.mapped_memory import copy_rows, will_need
from trainkit.data.pairing import pairs_of
from trainkit.data.settings import PreparationSettings
from trainkit.errors import UserError

FETCHES = 4  # shards of about 25 MB at once


class _Batch(NamedTuple):
    """One record batch: `columns` are Arrow's, the rest are views of its buffers."""

    columns: pa.RecordBatch
    pixels: np.ndarray  # (rows, H, W, C) of a fixed size, or flat; flat bytes of encoded images
    offsets: list[int] | None  # where each image starts in flat pixels, and where the last one ends
    heights: list[int] | None  # of flat pixels
    widths: list[int] | None


class _Shard(NamedTuple):
    starts: list[int]  # first row of each batch
    batches: list[_Batch]


class PreparedImages:
    """The images of a prepared dataset by number, 0 to `len() - 1`. Raises `UserError` if it is not complete.

    Opening reads three small files and the sizes in the folder; a shard is mapped when first used. From a URL (with
    `storage_options`, JSON) it is fetched whole then, and kept until `read_ahead` requests others. `stored_height` and
    `stored_width` are the size of the images of `gather`. `height` and `width` are the size in training (its
    `resolution`), which is smaller if the dataset was prepared with `--stored_resolution`.
    """

    components: ClassVar[dict] = {}  # of the saved pipeline: latents add a decoder
    holds_latents: ClassVar[bool] = False  # pixels, which `to_model_range` scales

    def __init__(
        self,
        folder: str | Path | RemotePath,
        resolution: tuple[int, int] | None = None,
        storage_options: str | None = None,
    ):
        self.folder = location(folder, storage_options)
        preparation = read_preparation(self.folder)
        if preparation is None:
            raise UserError(
                f"{folder} is not a complete prepared dataset ({PREPARATION_NAME} is missing or of another run); "
                "run prepare_dataset.py with the same --output_dir again"
            )
        if preparation.get("format") != FORMAT:
            raise UserError(f"{folder} was prepared by another version of these scripts; prepare the images again")
        info = json.loads(read_text(self.folder / "dataset_info.json"))
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
        self.pairs = pairs_of(preparation)
        self.vector_length: int | None = info["features"].get("vector", {}).get("length")
        self._shards = [shard for shard in preparation["shards"] if shard["num_rows"]]
        present = sizes(self.folder)
        for shard in self._shards:
            self._check_size(shard, present.get(shard["filename"]))
        self._shard_starts = np.cumsum([0] + [shard["num_rows"] for shard in self._shards])
        self._shards_open: dict[int, _Shard] = {}  # the shards used so far
        # The address of the first pixel of each; 0: not open yet, or in several batches.
        self._addresses = np.zeros(len(self._shards), dtype=np.int64)
        self._being_opened: dict[int, Future[_Shard]] = {}
        self._fetchers: ThreadPoolExecutor | None = None  # of shards at a URL that are needed soon
        self._wanted: set[int] = set()
        self._opening = threading.Lock()  # loaders gather in several threads

    def __len__(self) -> int:
        return int(self._shard_starts[-1])

    def __reduce__(self):  # another process maps the files itself
        return PreparedImages, (self.folder, (self.height, self.width))

    def gather(self, indices: np.ndarray, crops: np.ndarray | None = None) -> np.ndarray:
        """Copy images in the order of `indices` (B,): (B, H, W, C) uint8, or uint16 at 16 bits.

        `crops` (B, 2) in [0, 1) places the stored window along height and width in images stored with their own
        aspect ratio; None means the centre. Images of a fixed size are not cropped. Encoded images are decoded here,
        in the threads that gather.
        """
        height, width = self.stored_height, self.stored_width
        if self._in_rows:
            return self._gather_fixed(indices)
        images = np.empty((len(indices), height, width, self.channels), dtype=self.settings.dtype)
        for position, (batch, row) in enumerate(self.located(indices)):
            crop = None if crops is None else crops[position]
            images[position] = window_of(self._whole_image(batch, row), height, width, crop)
        return images

    def _gather_fixed(self, indices: np.ndarray) -> np.ndarray:
        """Copy images of one size with a single call for all shards."""
        addresses = self._fixed_addresses(indices)
        if addresses is None:
            return np.stack([batch.pixels[row] for batch, row in self.located(indices)])
        shape = (len(addresses), self.stored_height, self.stored_width, self.channels)
        return copy_rows(addresses, self._image_bytes).view(self.settings.dtype).reshape(shape)

    def _fixed_addresses(self, indices: np.ndarray) -> np.ndarray | None:
        """Return where images of one size are in memory (B,); None for large images in several batches of a shard."""
        numbers, rows = self._shards_and_rows(indices)
        if not self._addresses[numbers].all():
            self.located(indices)  # opens their shards
        addresses = self._addresses[numbers]
        return addresses + rows * self._image_bytes if addresses.all() else None

    @property
    def _in_rows(self) -> bool:
        return self.fixed_size and self.settings.storage == "pixels"

    @property
    def _image_bytes(self) -> int:
        return self.stored_height * self.stored_width * self.channels * self.settings.dtype.itemsize

    def _whole_image(self, batch: _Batch, row: int) -> np.ndarray:
        """Return an image (h, w, C) of its own size."""
        assert batch.offsets is not None  # images of several sizes are stored flat
        flat = batch.pixels[batch.offsets[row] : batch.offsets[row + 1]]
        if self.settings.storage != "pixels":
            return decode(flat.tobytes(), self.settings)
        assert batch.heights is not None and batch.widths is not None
        return flat.reshape(batch.heights[row], batch.widths[row], self.channels)

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Return class numbers (B,) int64 into `label_names`; -1 if the class of an image is not known."""
        if self.label_names is None:
            return np.full(len(indices), NO_LABEL, dtype=np.int64)
        return np.array(self._values("label", indices), dtype=np.int64)

    def texts(self, indices: np.ndarray) -> list[str]:
        """Return captions; an empty one for an image without."""
        return [text or "" for text in self._values("text", indices)] if self.has_text else [""] * len(indices)

    def vectors(self, indices: np.ndarray) -> np.ndarray:
        """Return the vectors (B, D) float32 that are stored with the images; D is 0 if there are none."""
        length = self.vector_length or 0
        vectors = np.empty((len(indices), length), dtype=np.float32)
        for position, (batch, row) in enumerate(self.located(indices) if length else ()):
            numbers = batch.columns.column("vector").values.to_numpy()
            vectors[position] = numbers[row * length : (row + 1) * length]
        return vectors

    def sources(self, indices: np.ndarray) -> list[str]:
        """Return the source of each image: its path in the source folder, or its row."""
        return self._values("source", indices)

    def column(self, name: str) -> Iterator[np.ndarray]:
        """Yield `label` (n,) or `vector` (n, D) of all images in order, one record batch at a time."""
        for batch, first, end in self.parts(0, len(self)):
            values = batch.columns.column(name).slice(first, end - first)
            if name == "vector":
                yield values.flatten().to_numpy().reshape(end - first, self.vector_length)
            else:
                yield values.to_numpy(zero_copy_only=False)

    def _values(self, column: str, indices: np.ndarray) -> list:
        return [batch.columns.column(column)[row].as_py() for batch, row in self.located(indices)]

    def read_ahead(self, ranges: list[tuple[int, int]]) -> None:
        """Start to read the images of `ranges` (first, end), from front to back, without waiting.

        At a URL their shards are fetched. They and the shards of the previous call are kept; others are released.
        """
        if isinstance(self.folder, RemotePath):
            self._fetch_ahead(ranges)
            return
        for first, end in ranges:
            will_need(_memory(batch, start, stop) for batch, start, stop in self.parts(first, end))

    def read_soon(self, indices: np.ndarray) -> None:
        """Start to read the images `indices` (B,) of a local dataset, in any order, without waiting."""
        if isinstance(self.folder, RemotePath):  # its shards are fetched whole, by `read_ahead` or `gather`
            return
        with contextlib.suppress(UserError):  # a damaged shard is reported by `gather`
            addresses = self._fixed_addresses(indices) if self._in_rows else None
            if addresses is None:
                will_need(_memory(batch, row, row + 1) for batch, row in self.located(indices))
            else:
                will_need((address, self._image_bytes) for address in addresses.tolist())

    def _fetch_ahead(self, ranges: list[tuple[int, int]]) -> None:
        ends = [self._shards_and_rows(np.array([first, end - 1]))[0].tolist() for first, end in ranges]
        numbers = dict.fromkeys(number for first, last in ends for number in range(first, last + 1))
        if self._fetchers is None:
            self._fetchers = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
        with self._opening:
            kept, self._wanted = self._wanted | set(numbers), set(numbers)
            self._shards_open = {number: shard for number, shard in self._shards_open.items() if number in kept}
        for number in numbers:
            if number not in self._shards_open:
                self._fetchers.submit(self._fetch, number)

    def _fetch(self, number: int) -> None:
        if number in self._wanted:  # it may be released already
            self._shard(number)  # an error is raised again by `gather`

    def parts(self, first: int, end: int) -> Iterator[tuple[_Batch, int, int]]:
        """Yield the batches that hold rows `first` to `end` - 1, each with its rows."""
        while first < end:
            [(batch, row)] = self.located(np.array([first]))
            count = min(end - first, batch.columns.num_rows - row)
            yield batch, row, row + count
            first += count

    def _shards_and_rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for each index the number of its shard and the row in it."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"image {indices.min()} to {indices.max()} of {len(self)}")
        numbers = np.searchsorted(self._shard_starts, indices, side="right") - 1
        return numbers, indices - self._shard_starts[numbers]

    def located(self, indices: np.ndarray) -> list[tuple[_Batch, int]]:
        """Return for each index its batch and the row in it."""
        numbers, rows = self._shards_and_rows(indices)
        located = []
        for number, row in zip(numbers.tolist(), rows.tolist(), strict=True):
            starts, batches = self._shards_open.get(number) or self._shard(number)
            place = 0 if len(batches) == 1 else bisect.bisect_right(starts, row) - 1
            located.append((batches[place], row - starts[place]))
        return located

    def _shard(self, number: int) -> _Shard:
        """Return a shard; the first thread that needs it opens it, while other threads may open others."""
        with self._opening:
            if number in self._shards_open:
                return self._shards_open[number]
            opened = self._being_opened.get(number)
            if is_first := opened is None:
                opened = self._being_opened[number] = Future()
        if is_first:
            try:
                opened.set_result(self._open_shard(number))
            except BaseException as error:
                opened.set_exception(error)
            with self._opening:
                if opened.exception() is None:
                    self._shards_open[number] = opened.result()
                del self._being_opened[number]
        return opened.result()

    def _open_shard(self, number: int) -> _Shard:
        shard = self._shards[number]
        path = self.folder / shard["filename"]
        try:
            self._check_size(shard, size(path))
            batches = list(open_stream(path))
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            if isinstance(path, RemotePath) and getattr(error, "errno", None) == errno.EIO:
                raise UserError(
                    f"{path} cannot be fetched ({reason}); when the store answers again, resume from a checkpoint"
                ) from None
            raise self._broken(path, reason) from None
        if sum(batch.num_rows for batch in batches) != shard["num_rows"]:
            raise self._broken(path, f"it should hold {shard['num_rows']} images")
        starts = list(accumulate((batch.num_rows for batch in batches[:-1]), initial=0))
        views = [self._views(batch) for batch in batches]
        if len(views) == 1 and isinstance(path, Path):  # a fetched shard may be released
            self._addresses[number] = views[0].pixels.ctypes.data
        return _Shard(starts, views)

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

    def _check_size(self, shard: dict, num_bytes: int | None) -> None:
        if num_bytes != shard["num_bytes"]:
            found = "No such file" if num_bytes is None else f"{num_bytes} bytes instead of {shard['num_bytes']}"
            raise self._broken(self.folder / shard["filename"], found)

    def _broken(self, path: Path | RemotePath, reason: str) -> UserError:
        return UserError(
            f"{path} is damaged ({reason}); delete it and run the preparation again, which redoes only it"
        )


def window_of(image: np.ndarray, height: int, width: int, crop: np.ndarray | None) -> np.ndarray:
    """Return the window (height, width, C) of an image (h, w, C) at `crop` (2,) in [0, 1), or in its centre."""
    if crop is None:
        top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    else:
        top, left = int(crop[0] * (image.shape[0] - height + 1)), int(crop[1] * (image.shape[1] - width + 1))
    return image[top : top + height, left : left + width]


def _memory(batch: _Batch, first: int, end: int) -> tuple[int, int]:
    """Return where the pixels of rows `first` to `end` - 1 are in memory: address and number of bytes."""
    start, stop = (first, end) if batch.offsets is None else (batch.offsets[first], batch.offsets[end])
    part = batch.pixels[start:stop]
    return part.ctypes.data, part.nbytes
