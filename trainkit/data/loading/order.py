"""The order of samples and every random draw of training, as pure functions of the seed and a position.

There is no state to save: a resume at step s computes step s. The sample at position p of epoch e comes
from a keyed permutation, in O(1) time and memory: a Feistel network over a domain just above N, walked until it lands
inside (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Draws come from the counter-based generator
Philox (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"), on the CPU, so they are the same on
any device and for any distribution of the global batch over processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np

ROUNDS = 8
WINDOW_BLOCKS = 16


class Purpose(IntEnum):
    """The purpose of a stream of draws. Each has its own Philox key, so adding one does not change the others."""

    NOISE = 0
    TIMESTEPS = 1
    FLIP = 2
    CROP_TOP = 3
    CROP_LEFT = 4
    ROTATION = 5
    TRANSLATION_X = 6
    TRANSLATION_Y = 7
    SCALE = 8
    BRIGHTNESS = 9
    CONTRAST = 10
    SATURATION = 11
    HUE = 12
    RESIZED_CROP_AREA = 13
    RESIZED_CROP_ASPECT = 14
    RESIZED_CROP_TOP = 15
    VALIDATION_NOISE = 16
    VALIDATION_TIMESTEPS = 17
    RESIZED_CROP_LEFT = 18
    CONDITION_DROPOUT = 19
    LATENT = 24
    PICTURE_DROPOUT = 32
    PICTURE_NOISE = 33
    PICTURE_NOISE_LEVEL = 34
    MASK = 35
    VECTOR_DROPOUT = 36


# purpose of a dropout -> numbers (B,) in [0, 1): what is below the probability of the dropout is dropped
DropoutDraws: TypeAlias = Callable[[Purpose], np.ndarray]


@dataclass(frozen=True)
class SampleOrder:
    """The endless order in which `num_samples` images are trained on; every epoch visits each of them once.

    With `block_size` 0 an epoch is one permutation of all images. Otherwise it permutes blocks of `block_size`
    adjacent images, and then the images within each window of `WINDOW_BLOCKS` blocks: a window is read once, from
    front to back. The first block starts elsewhere in every epoch, so all neighbours are separated at some time.
    """

    num_samples: int
    seed: int
    block_size: int = 0

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Return the images at `positions` (any shape, int64, counted from the start of training) in O(1) each."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        keys = _epoch_keys(epochs, self.seed)
        if self._in_blocks == 0:
            return _permutation(places, keys, self.num_samples)
        mixed = np.empty_like(places)
        for start, end in self._window_classes():
            here = (start <= places) & (places < end)
            windows, inside = np.divmod(places[here] - start, self._window_size)
            first = start + windows * self._window_size
            window_keys = _mix(keys[here] ^ _mix(first.astype(np.uint64)))
            mixed[here] = first + _permutation(inside, window_keys, min(self._window_size, end - start))
        return self._row(mixed, keys)

    def window(self, position: int) -> tuple[int, int]:
        """Return the positions (first, end) of the window that contains `position`."""
        epoch, place = divmod(position, self.num_samples)
        start, end = next((start, end) for start, end in self._window_classes() if start <= place < end)
        first = start + (place - start) // self._window_size * self._window_size
        return epoch * self.num_samples + first, epoch * self.num_samples + min(first + self._window_size, end)

    def ranges(self, first: int, end: int) -> list[tuple[int, int]]:
        """Return the images of a window (`first`, `end`) as ranges (first, end) of adjacent images."""
        epoch, place = divmod(first, self.num_samples)
        places = np.arange(place, place + end - first, self.block_size)
        lengths = np.minimum(self.block_size, place + end - first - places)
        rows = self._row(places, _epoch_keys(np.full(len(places), epoch), self.seed))
        ranges = []
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            over = max(0, row + length - self.num_samples)  # a block at the end continues at the start
            ranges += [(row, row + length - over)] + [(0, over)] * (over > 0)
        return ranges

    @property
    def _window_size(self) -> int:
        return WINDOW_BLOCKS * self.block_size

    @property
    def _in_blocks(self) -> int:
        """Images in whole blocks; the remaining ones have a separate window."""
        return 0 if self.block_size == 0 else self.num_samples // self.block_size * self.block_size

    def _window_classes(self) -> list[tuple[int, int]]:
        """Return places (start, end) of an epoch: the windows of full size, the shorter one after them, the rest."""
        full = self._in_blocks // self._window_size * self._window_size
        bounds = (0, full, self._in_blocks, self.num_samples)
        return [(start, end) for start, end in zip(bounds, bounds[1:], strict=False) if start < end]

    def _row(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return the images at `places` of the permuted blocks of an epoch."""
        blocks, inside = np.divmod(places, self.block_size)
        whole = places < self._in_blocks
        blocks[whole] = _permutation(blocks[whole], _mix(keys[whole]), self._in_blocks // self.block_size)
        shifts = (keys % np.uint64(self.num_samples)).astype(np.int64)
        return (blocks * self.block_size + inside + shifts) % self.num_samples


def sample_indices(positions: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Return the dataset indices at `positions` of the order without blocks."""
    return SampleOrder(num_samples, seed).indices(positions)


def uniform_draws(seed: int, step: int, purpose: Purpose, count: int) -> np.ndarray:
    """Return `count` numbers in [0, 1), float64: one per row of the global batch of optimizer step `step`."""
    return _philox(seed, step, purpose).random(count)


def normal_draws(
    seed: int, step: int, rows: Sequence[int], shape: tuple[int, ...], purpose: Purpose = Purpose.NOISE
) -> np.ndarray:
    """Return normal noise (len(rows), *shape) float32 for `rows` of the global batch of optimizer step `step`."""
    noise = np.empty((len(rows), *shape), dtype=np.float32)
    for out, row in zip(noise, rows, strict=True):
        _philox(seed, step, purpose, row).standard_normal(dtype=np.float32, out=out)
    return noise


def row_generator(seed: int, step: int, purpose: Purpose, row: int) -> np.random.Generator:
    """Return the generator of `row` of the global batch of optimizer step `step`, for draws of any number."""
    return _philox(seed, step, purpose, row)


def _philox(seed: int, step: int, purpose: Purpose, row: int = 0) -> np.random.Generator:
    # The stream itself uses the lowest counter word: it has 2**64 blocks before it reaches the next stream.
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, int(purpose)], counter=[0, row, step, 0]))


def _epoch_keys(epochs: np.ndarray, seed: int) -> np.ndarray:
    return _mix(epochs.astype(np.uint64) + _mix(np.full((), seed % 2**64, dtype=np.uint64)))


def _permutation(places: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
    """Apply the permutations of range(`size`) with `keys` (uint64) to `places` (int64), both of one shape."""
    found = _feistel(places, keys, size)
    outside = found >= size
    while outside.any():  # cycle walking: the domain exceeds `size` by at most 2 sqrt(size) + 1
        found[outside] = _feistel(found[outside], keys[outside], size)
        outside = found >= size
    return found


def _feistel(places: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
    """Apply the network once, over side x side >= `size`."""
    side = np.uint64(int(np.ceil(np.sqrt(size))))
    left, right = np.divmod(places.astype(np.uint64), side)
    for round_number in range(ROUNDS):
        round_keys = _mix(keys + np.uint64(round_number + 1))
        left, right = right, (left + _mix(right + round_keys)) % side
    return (left * side + right).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al. 2014): a bijection of 64-bit words that spreads every input bit."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
