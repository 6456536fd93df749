"""Images as arrays in an HDF5 file, with labels, captions, vectors and pairs: read in slices, never whole.

Every process opens the file for itself, so any number of workers may read.
"""

# N images, H/W height and width, C channels

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from trainkit.data import faults
from trainkit.data.account import Account, Kind
from trainkit.data.faults import RejectedImage
from trainkit.data.sources import records
from trainkit.data.sources.columns import Labels
from trainkit.data.sources.entries import ReadOptions
from trainkit.data.sources.hdf5_arrays import ENCODED, LAYOUTS, Arrays, find_arrays, read_labels, scalar
from trainkit.data.sources.locations import DataFile, Location, is_url, open_file, opened
from trainkit.data.sources.records import Record, Unit, digest
from trainkit.data.sources.texts import caption_text
from trainkit.errors import UserError, one_line
from trainkit.packages import load_package

BLOCK_BYTES = 8 * 2**20  # read at once
ENCODED_ROWS = 32  # of image files, read at once
CHUNK_CACHE_BYTES = 64 * 2**20  # of h5py, for each array: a chunk that several blocks share is unpacked once
SAMPLED_IMAGES = 16  # checked for the range of floats
SLACK = 1e-3  # how far above 1 a resize may have carried a float


class Hdf5File:
    """The images of one HDF5 file."""

    def __init__(self, file: DataFile, name: str, options: ReadOptions):
        self.name, self.file, self.account = name, file, Account()
        self._where = f"--train_data_dir {file.location.path}"
        with _one_line_for_damage(file.location), _open(file.location) as opened_file:
            self.arrays = find_arrays(opened_file, options, self.account, self._where)
            self._count = len(opened_file[self.arrays.image])
            self.account.add(Kind.ROWS_FOUND, count=self._count)
            self.pairs = options.pairs if self.arrays.condition else None
            if not self._count:
                shape = opened_file[self.arrays.image].shape
                raise UserError(f"{self._where} holds no image: `{self.arrays.image}` is {shape}")
            self._check_values(self.arrays.image, self.arrays.layout, opened_file)
            if self.arrays.condition and self.arrays.condition_layout:
                is_map = self.pairs is not None and self.pairs.classes is not None
                self._check_values(self.arrays.condition, self.arrays.condition_layout, opened_file, is_map)
            self.labels = read_labels(opened_file, self.arrays, self.account)
            self.label_names = self.labels.names
            self.vector_length = opened_file[self.arrays.vector].shape[1] if self.arrays.vector else None
        self.has_text = self.arrays.text is not None
        self.fingerprint = digest(f"({file.stamp!r}, {self.arrays.identity})".encode())

    def __len__(self) -> int:
        return self._count

    @property
    def reader(self) -> "Hdf5Reader":
        return Hdf5Reader(self.file.location, self.arrays, self.labels)

    def units(self) -> list[Unit]:
        rows, size = range(len(self)), records.UNIT_ITEMS
        parts = [rows[start : start + size] for start in range(0, len(self), size)]
        return [Unit(digest(repr((self.fingerprint, part.start, part.stop)).encode()), part) for part in parts]

    def _check_values(self, path: str, layout: str, file: Any, is_map: bool = False) -> None:
        """Refuse what could mean several things, before the long part starts."""
        array = file[path]
        if layout == ENCODED or array.dtype in (np.uint8, np.uint16) or (is_map and array.dtype.kind in "iub"):
            return
        if is_map:
            raise UserError(f"{self._where}: `{path}` is {array.dtype}; store the ids of label maps as whole numbers")
        if array.dtype.kind != "f":
            raise UserError(f"{self._where}: `{path}` is {array.dtype}; store uint8, or floats in [0, 1]")
        step = max(1, self._count // SAMPLED_IMAGES)
        samples = np.stack([array[row] for row in range(0, self._count, step)][: SAMPLED_IMAGES + 1])
        low, high = float(np.nanmin(samples)), float(np.nanmax(samples))
        if low < -SLACK or high > 1 + SLACK:
            fix = "store (x + 1) / 2" if low < 0 and high <= 1 + SLACK else "store uint8, or divide by the range"
            raise UserError(f"{self._where}: `{path}` holds floats from {low:.3g} to {high:.3g}, wanted [0, 1]: {fix}")


class Hdf5Reader(NamedTuple):
    location: Location
    arrays: Arrays
    labels: Labels

    def name(self, row: int) -> str:
        return f"row {row}"

    def read(self, row: int) -> Record:
        try:
            blocks = opened(_Blocks, self.location)
            image, label, text, vector, condition = (
                blocks.row(name, row) if name else None
                for name in (
                    self.arrays.image, self.arrays.label, self.arrays.text, self.arrays.vector, self.arrays.condition
                )
            )  # fmt: skip
        except FileNotFoundError:
            raise RejectedImage(faults.MISSING, "the file was removed meanwhile") from None
        except (OSError, RuntimeError, ValueError, KeyError) as error:  # all that HDF5 raises for a damaged chunk
            raise RejectedImage(faults.CORRUPT, one_line(error)) from None
        number, notes = self._label(label)
        if vector is not None:
            vector = vector.astype(np.float32)
        caption = None if text is None else _caption(text)
        if self.arrays.text is not None and caption is None:
            notes = (*notes, Kind.EMPTY_CAPTION)
        assert image is not None  # `arrays.image` is always set
        return Record(_image(image, self.arrays.layout), number, caption, vector, notes, self._condition(condition))

    def _condition(self, condition: np.ndarray | None) -> np.ndarray | bytes | None:
        """The conditioning image as a `Record` has it. Raises `RejectedImage`."""
        if condition is None or self.arrays.condition_layout is None:
            return None
        try:
            return _image(condition, self.arrays.condition_layout)
        except RejectedImage as error:
            raise faults.of_condition(error) from None

    def _label(self, label: Any) -> tuple[int, tuple[Kind, ...]]:
        if label is None:
            value = None
        elif self.arrays.is_one_hot:
            value = int(np.argmax(label)) if np.any(label) else None
        else:
            value = scalar(label)
        number, is_class = self.labels.number(value)
        is_gap = isinstance(value, int | float) and value < 0
        return number, () if is_class or is_gap or self.labels.is_counted else (Kind.LABEL_NOT_A_CLASS,)


class _Blocks:
    """The rows of one open file, read in blocks."""

    def __init__(self, location: Location):
        self._file = _open(location)
        self._blocks: dict[str, tuple[int, np.ndarray]] = {}

    def row(self, name: str, row: int) -> Any:
        start, block = self._blocks.get(name, (0, ()))
        if not start <= row < start + len(block):
            array = self._file[name]
            row_bytes = max(8, int(np.prod(array.shape[1:])) * array.dtype.itemsize)
            rows = max(1, min(records.UNIT_ITEMS, BLOCK_BYTES // row_bytes))
            if array.dtype.kind == "O":
                rows = min(rows, ENCODED_ROWS)
            start = row - row % rows
            try:
                block = array[start : start + rows]
            except (OSError, RuntimeError):  # one damaged chunk must not cost its neighbours
                return array[row]
            self._blocks[name] = start, block
        return block[row - start]


def _image(image: np.ndarray, layout: str) -> np.ndarray | bytes:
    """An image of an array with this layout, as a `Record` has it. Raises `RejectedImage`."""
    if layout == ENCODED:
        return image.tobytes()
    image = image.transpose(LAYOUTS[layout]) if layout in LAYOUTS else image[..., None]
    if image.dtype.kind == "f":
        if not (image.min() >= -SLACK and image.max() <= 1 + SLACK):  # false for NaN
            raise RejectedImage(faults.OUT_OF_RANGE, "it holds numbers outside of [0, 1]")
        image = image.clip(0, 1)
    return np.ascontiguousarray(image)


def _open(location: Location) -> Any:
    """The file, opened for reading. Raises `UserError` if it is not an HDF5 file, OSError if it is missing."""
    h5py = load_package("h5py", f"--train_data_dir {location.path}")
    try:
        if is_url(location.path):
            return h5py.File(open_file(location), "r", rdcc_nbytes=CHUNK_CACHE_BYTES)
        return h5py.File(location.path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES, locking=False)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise _not_whole(location, error) from None


@contextlib.contextmanager
def _one_line_for_damage(location: Location) -> Iterator[None]:
    """Turn what h5py raises for a damaged file into a `UserError`."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _not_whole(location, error) from None


def _not_whole(location: Location, error: Exception) -> UserError:
    return UserError(f"--train_data_dir {location.path} is not a whole HDF5 file ({one_line(error, 200)})")


def _caption(text: Any) -> str | None:
    """A caption, or all captions of an image with one per line; None for an empty one."""
    values = text.reshape(-1).tolist() if isinstance(text, np.ndarray) else [text]
    values = [scalar(value) for value in values]
    caption = caption_text(values if len(values) > 1 else values[0]) if values else None
    return caption if (caption or "").strip() else None
