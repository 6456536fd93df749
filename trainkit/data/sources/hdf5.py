"""Images as arrays in an HDF5 file, `data` beside `labels`, `texts` and `vectors`: read in slices, never whole.

Every process opens the file for itself, so any number of workers may read.
"""

# N images, H/W height and width, C channels

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from trainkit.data import faults
from trainkit.data.account import Account
from trainkit.data.faults import RejectedImage
from trainkit.data.format import NO_LABEL
from trainkit.data.sources import records
from trainkit.data.sources.entries import ReadOptions
from trainkit.data.sources.locations import DataFile, Location, is_url, open_file, opened
from trainkit.data.sources.records import Record, Unit, digest, sorted_labels
from trainkit.errors import UserError
from trainkit.packages import load_package

IMAGE_NAMES, LABEL_NAMES = ("data", "images"), ("labels", "label")
TEXT_NAMES = ("texts", "captions", "text", "caption")
CHANNELS = (1, 3, 4)
LAYOUTS = {"NHWC": (0, 1, 2), "NCHW": (1, 2, 0)}  # how an image's axes become height, width, channels
BLOCK_BYTES = 8 * 2**20  # read at a time
CHUNK_CACHE_BYTES = 64 * 2**20  # of h5py, for each array: a chunk that several blocks share is unpacked once
SAMPLED_IMAGES = 16  # looked at, to tell what floats mean
SLACK = 1e-3  # how far above 1 a resize may have carried a float


class Arrays(NamedTuple):
    """What the arrays are called, and how `data` is laid out."""

    image: str
    layout: str
    label: str | None
    text: str | None
    vector: str | None


class Hdf5File:
    """The images of one HDF5 file."""

    def __init__(self, file: DataFile, name: str, options: ReadOptions):
        self.name, self.file, self.account = name, file, Account()
        vector_column = options.columns.vector
        self._where = f"--train_data_dir {file.location.path}"
        with _damage_told(file.location), _open(file.location) as opened_file:
            image, layout = self._find_images(opened_file)
            self._count = len(opened_file[image])
            label, text = (self._find(opened_file, names) for names in (LABEL_NAMES, TEXT_NAMES))
            vector = self._find(opened_file, dict.fromkeys([vector_column, "vectors", "vector"]), (2,))
            if vector_column != "vector" and vector != vector_column:
                raise UserError(f"--vector_column {vector_column}: {file.location.path} has no such array of (N, D)")
            self.arrays = Arrays(image, layout, label, text, vector)
            self.label_names, self._label_ids = _classes(opened_file, label)
            self.vector_length = opened_file[vector].shape[1] if vector else None
            self._check_values(opened_file[image])
        self.has_text = text is not None
        self.fingerprint = digest(repr((file.stamp, self.arrays)).encode())

    def __len__(self) -> int:
        return self._count

    @property
    def reader(self) -> "Hdf5Reader":
        return Hdf5Reader(self.file.location, self.arrays, self._label_ids)

    def units(self) -> list[Unit]:
        rows, size = range(len(self)), records.UNIT_ITEMS
        parts = [rows[start : start + size] for start in range(0, len(self), size)]
        return [Unit(digest(repr((self.fingerprint, part.start, part.stop)).encode()), part) for part in parts]

    def _find_images(self, opened_file: Any) -> tuple[str, str]:
        arrays = {name: array for name, array in opened_file.items() if hasattr(array, "shape")}
        found = [name for name in IMAGE_NAMES if name in arrays]
        found = found or [name for name, array in arrays.items() if len(array.shape) == 4]
        if len(found) != 1 and not (found and found[0] in IMAGE_NAMES):
            held = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "no array"
            raise UserError(f"{self._where} has no array `data` of (N, H, W, C) or (N, C, H, W); it has {held}")
        shape, array = arrays[found[0]].shape, arrays[found[0]]
        told = array.attrs.get("layout")
        told = told.decode() if isinstance(told, bytes) else told
        fits = [layout for layout, axes in LAYOUTS.items() if len(shape) == 4 and shape[1 + axes[2]] in CHANNELS]
        if len(shape) == 3 and told is None:
            return found[0], "NHW"
        if told in LAYOUTS and told in fits:
            return found[0], told
        if len(fits) == 1 and told is None:
            return found[0], fits[0]
        if told is not None or not fits:
            raise UserError(f"{self._where}: `{found[0]}` {shape} is not (N, H, W, C) or (N, C, H, W) of 1, 3 or 4")
        raise UserError(
            f"{self._where}: `{found[0]}` {shape} may have its channels first or last; say which in h5py: "
            f"file['{found[0]}'].attrs['layout'] = 'NHWC' (or 'NCHW')"
        )

    def _find(self, opened_file: Any, names: Any, dimensions: tuple = (1, 2)) -> str | None:
        for name in names:
            array = opened_file.get(name)
            if array is not None and len(getattr(array, "shape", ())) in dimensions:
                if len(array) != self._count:
                    raise UserError(f"{self._where}: `{name}` has {len(array)} rows for {self._count} images")
                return name
        return None

    def _check_values(self, array: Any) -> None:
        """Refuse what could mean several things, before the long part starts."""
        if not self._count:
            raise UserError(f"{self._where} holds no image: `{self.arrays.image}` is {array.shape}")
        if array.dtype in (np.uint8, np.uint16):
            return
        if array.dtype.kind != "f":
            raise UserError(f"{self._where}: `{self.arrays.image}` is {array.dtype}; store uint8, or floats in [0, 1]")
        step = max(1, self._count // SAMPLED_IMAGES)
        samples = np.stack([array[row] for row in range(0, self._count, step)][: SAMPLED_IMAGES + 1])
        low, high = float(np.nanmin(samples)), float(np.nanmax(samples))
        if low < -SLACK or high > 1 + SLACK:
            fix = "store (x + 1) / 2" if low < 0 and high <= 1 + SLACK else "store uint8, or divide by the range"
            raise UserError(
                f"{self._where}: `{self.arrays.image}` holds floats from {low:.3g} to {high:.3g}, wanted [0, 1]: {fix}"
            )


class Hdf5Reader(NamedTuple):
    location: Location
    arrays: Arrays
    label_ids: dict[str, int] | None

    def name(self, row: int) -> str:
        return f"row {row}"

    def read(self, row: int) -> Record:
        try:
            blocks = opened(_Blocks, self.location)
            image, label, text, vector = (
                blocks.row(name, row) if name else None
                for name in (self.arrays.image, self.arrays.label, self.arrays.text, self.arrays.vector)
            )
        except FileNotFoundError:
            raise RejectedImage(faults.MISSING, "the file is not there any more") from None
        except (OSError, RuntimeError, ValueError, KeyError) as error:  # whatever a damaged chunk makes HDF5 raise
            raise RejectedImage(faults.CORRUPT, " ".join(str(error).split())[:300]) from None
        if self.arrays.layout in LAYOUTS:
            image = image.transpose(LAYOUTS[self.arrays.layout])
        else:
            image = image[..., None]
        if image.dtype.kind == "f":
            if not (image.min() >= -SLACK and image.max() <= 1 + SLACK):  # false for what is not a number
                raise RejectedImage(faults.OUT_OF_RANGE, "it holds numbers outside of [0, 1]")
            image = image.clip(0, 1)
        if vector is not None:
            vector = vector.astype(np.float32)
        text = _text(text) if text is not None else None
        return Record(np.ascontiguousarray(image), self._label(label), text or None, vector)

    def _label(self, label: Any) -> int:
        if label is None:
            return NO_LABEL
        return self.label_ids.get(_text(label), NO_LABEL)


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
            start = row - row % rows
            try:
                block = array[start : start + rows]
            except (OSError, RuntimeError):  # one damaged chunk must not cost its neighbours
                return array[row]
            self._blocks[name] = start, block
        return block[row - start]


def _open(location: Location) -> Any:
    """The file, opened for reading. Raises `UserError` where it is no HDF5 file, OSError where it is not there."""
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
def _damage_told(location: Location) -> Iterator[None]:
    """Whatever a damaged file makes h5py raise while it is looked through, as one line."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _not_whole(location, error) from None


def _not_whole(location: Location, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"--train_data_dir {location.path} is no whole HDF5 file ({reason})")


def _text(value: Any) -> str:
    value = value.reshape(-1)[0] if isinstance(value, np.ndarray) else value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _classes(opened_file: Any, label: str | None) -> tuple[list[str] | None, dict[str, int] | None]:
    """Class names, and the number of each label (as text). Whole numbers below 0 stand for no class."""
    if label is None:
        return None, None
    array = opened_file[label]
    told = next((a.attrs["class_names"] for a in (array, opened_file) if "class_names" in a.attrs), None)
    if told is not None:
        names = [_text(name) for name in told]
        is_number = array.dtype.kind in "iu"
        return names, {str(number) if is_number else name: number for number, name in enumerate(names)}
    found = set()
    for start in range(0, len(array), 2**20):
        found |= {_text(value) for value in np.unique(array[start : start + 2**20])}
    if array.dtype.kind in "iu":
        found = {number for number in found if int(number) >= 0}
    names = sorted_labels(found)
    return names, {name: number for number, name in enumerate(names)}
