"""The formats of samples: a file per image, one .npz file, or a prepared dataset.

Every format can be written by several processes and be continued after a kill. A file per image is written at once.
The others are collected in a staging folder, in pieces of a batch, and put together at the end.
"""

# N images, H/W pixels, C channels

import itertools
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from trainkit.atomic import TEMPORARY_PREFIX, replacing
from trainkit.data.images.storage import decode, encode
from trainkit.data.settings import CHANNELS, PreparationSettings

FILE_FORMATS = {"png": "png", "webp": "webp", "jpeg": "jpg"}  # name -> extension
JPEG_QUALITY = 95  # without subsampling of the colours
STAGING_FOLDER = ".staging"
PIECE = re.compile(r"(\d+)-(\d+)\.npy")
BLOCK_BYTES = 16 * 2**20


class Samples(Protocol):
    """The images of a folder of samples in one format. `write` may be called by several threads and processes."""

    pieces_at_once: bool  # whether a batch is best written by one call

    def held(self) -> set[int]:
        """The numbers of the images that are on disk."""

    def write(self, numbers: Sequence[int], images: np.ndarray) -> None:
        """Write images (N, H, W, C) uint8; they are on disk, each whole or not at all, when it returns."""

    def first(self, count: int) -> np.ndarray:
        """The first images (N, H, W, C), of samples that are put together."""

    def clear_temporary(self) -> None:
        """Delete unfinished files of a killed run."""

    def put_together(self, num_images: int) -> None:
        """Write what makes images 0 to `num_images` - 1 one file or dataset."""


def image_settings(image_shape: tuple[int, int, int], output_format: str = "arrow") -> PreparationSettings:
    """How images of (H, W, C) `image_shape` are stored, for the writers that prepared datasets have."""
    height, width, channels = image_shape
    mode = next(mode for mode, count in CHANNELS.items() if count == channels)
    storage = output_format if output_format in FILE_FORMATS else "pixels"
    quality = JPEG_QUALITY if output_format == "jpeg" else 100
    return PreparationSettings(height, width, "crop", mode, storage=storage, storage_quality=quality)


class ImageFiles:
    """One file per image: 000000.png, .webp (lossless) or .jpg (`JPEG_QUALITY`)."""

    pieces_at_once = False

    def __init__(self, folder: Path, output_format: str, image_shape: tuple[int, int, int]):
        self.folder, self._settings = folder, image_settings(image_shape, output_format)
        self._extension = FILE_FORMATS[output_format]

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.{self._extension}"

    def held(self) -> set[int]:
        if not self.folder.is_dir():
            return set()
        name = re.compile(rf"(\d{{6,}})\.{self._extension}")
        return {int(found[1]) for path in self.folder.iterdir() if (found := name.fullmatch(path.name))}

    def write(self, numbers: Sequence[int], images: np.ndarray) -> None:
        for number, image in zip(numbers, images, strict=True):
            with replacing(self.path(number)) as temporary:
                temporary.write_bytes(encode(image, self._settings))

    def first(self, count: int) -> np.ndarray:
        return np.stack([decode(self.path(number).read_bytes(), self._settings) for number in range(count)])

    def clear_temporary(self) -> None:
        for leftover in self.folder.glob(f"{TEMPORARY_PREFIX}*.{self._extension}"):
            leftover.unlink()

    def put_together(self, num_images: int) -> None:
        """Nothing is left to do."""


class Piece(NamedTuple):
    first: int
    num_images: int
    path: Path


class Staging:
    """Images on their way into one file: pieces FIRST-NUMBER.npy of consecutive images (N, H, W, C), in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder / STAGING_FOLDER

    def pieces(self) -> list[Piece]:
        """The pieces that are there, in the order of their images."""
        if not self.folder.is_dir():
            return []
        named = ((path, PIECE.fullmatch(path.name)) for path in self.folder.iterdir())
        return sorted(Piece(int(name[1]), int(name[2]), path) for path, name in named if name)

    def numbers(self) -> set[int]:
        return set(
            itertools.chain.from_iterable(
                range(piece.first, piece.first + piece.num_images) for piece in self.pieces()
            )
        )

    def write(self, numbers: Sequence[int], images: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        for rows in np.split(np.arange(len(numbers)), breaks):
            with replacing(self.folder / f"{numbers[rows[0]]:08d}-{len(rows)}.npy") as temporary:
                np.save(temporary, images[rows])

    def blocks(self, first: int) -> Iterator[np.ndarray]:
        """Yield the images from number `first` on, a piece (N, H, W, C) at a time."""
        for piece in self.pieces():
            end = piece.first + piece.num_images
            if end > first:  # pieces overlap where a process that was taken for lost has gone on
                yield np.load(piece.path)[max(0, first - piece.first) :]
                first = end

    def clear_temporary(self) -> None:
        for leftover in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink()

    def delete(self) -> None:
        if self.folder.is_dir():
            shutil.rmtree(self.folder)


def num_leading(numbers: set[int]) -> int:
    """How many of 0, 1, 2, ... `numbers` holds before the first gap."""
    return next(number for number in itertools.count() if number not in numbers)


def first_of(blocks: Iterator[np.ndarray], count: int) -> np.ndarray:
    """The first `count` images of `blocks` (N, H, W, C)."""
    taken: list[np.ndarray] = []
    while sum(map(len, taken)) < count:
        taken.append(next(blocks))
    return np.concatenate(taken)[:count]
