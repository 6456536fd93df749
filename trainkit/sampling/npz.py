"""Samples as one .npz file, as guided-diffusion writes it and the evaluators of ADM read it.

`arr_0` holds the images (N, H, W, C) uint8 in their order, `arr_1` the classes (N,) int64 of a class pipeline.
"""

import contextlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from trainkit.atomic import replacing
from trainkit.errors import UserError
from trainkit.sampling.conditions import Conditions
from trainkit.sampling.files import BLOCK_BYTES, Staging, first_of

NPZ_NAME = "samples.npz"
IMAGES, LABELS = "arr_0.npy", "arr_1.npy"
NO_TIME = (1980, 1, 1, 0, 0, 0)  # of the members, so that equal samples are equal files


class NpzSamples:
    """The file samples.npz in a folder. It is written and read a block at a time: memory does not grow with it."""

    pieces_at_once = True

    def __init__(self, folder: Path, image_shape: tuple[int, int, int], conditions: Conditions | None):
        self.path, self._staging, self._shape = folder / NPZ_NAME, Staging(folder), image_shape
        self._conditions = conditions

    def held(self) -> set[int]:
        return set(range(self._count())) | self._staging.numbers()

    def write(self, numbers, images: np.ndarray) -> None:
        self._staging.write(numbers, images)

    def first(self, count: int) -> np.ndarray:
        return first_of(read_blocks(self.path), count)

    def clear_temporary(self) -> None:
        self._staging.clear_temporary()
        for leftover in self.path.parent.glob(f".tmp-*-{NPZ_NAME}"):
            leftover.unlink()

    def put_together(self, num_images: int) -> None:
        count = self._count()
        if count < num_images:
            earlier = read_blocks(self.path) if count else iter(())
            labels = None if self._conditions is None else self._conditions.label_ids(num_images)
            write_npz(self.path, (num_images, *self._shape), _chain(earlier, self._staging.blocks, count), labels)
        self._staging.delete()

    def _count(self) -> int:
        """The images that the file holds; 0 if there is none."""
        if not self.path.exists():
            return 0
        with _open_images(self.path) as (_, shape):
            return shape[0]


def _chain(
    earlier: Iterator[np.ndarray], blocks: Callable[[int], Iterator[np.ndarray]], count: int
) -> Iterator[np.ndarray]:
    yield from earlier
    yield from blocks(count)


def write_npz(
    path: Path, shape: tuple[int, ...], blocks: Iterable[np.ndarray], labels: np.ndarray | None = None
) -> None:
    """Write `blocks` (n, H, W, C) uint8, together of `shape`, and `labels`; the file appears once it is complete."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(zipfile.ZipInfo(IMAGES, NO_TIME), "w", force_zip64=True) as member:
            _write_header(member, shape, np.dtype(np.uint8))
            for block in blocks:
                member.write(np.ascontiguousarray(block).data)
        if labels is not None:
            with archive.open(zipfile.ZipInfo(LABELS, NO_TIME), "w", force_zip64=True) as member:
                _write_header(member, labels.shape, labels.dtype)
                member.write(labels.tobytes())


def _write_header(member, shape: tuple[int, ...], dtype: np.dtype) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)


def read_blocks(path: Path) -> Iterator[np.ndarray]:
    """Yield the images of a file of `write_npz`, a block (n, H, W, C) at a time."""
    with _open_images(path) as (member, shape):
        image_bytes = int(np.prod(shape[1:]))
        step = max(1, BLOCK_BYTES // image_bytes)
        for start in range(0, shape[0], step):
            count = min(step, shape[0] - start)
            yield np.frombuffer(member.read(count * image_bytes), np.uint8).reshape(count, *shape[1:])


@contextlib.contextmanager
def _open_images(path: Path) -> Iterator:
    """The member with the images, at its first byte, and their shape. Raises `UserError` for a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(IMAGES) as member:
            np.lib.format.read_magic(member)
            shape, _, _ = np.lib.format.read_array_header_1_0(member)
            yield member, shape
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
        raise UserError(f"--output_dir: {path} is damaged ({error}); delete it, or use another folder") from None
