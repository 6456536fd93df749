"""The order of samples and every random draw of training, as pure functions of the seed and a position.

Nothing here has a state to save: resuming at step s is asking for step s. The sample at position p of epoch e comes
from a keyed permutation, in O(1) time and memory: a Feistel network over a domain just above N, walked until it lands
inside (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Draws come from the counter-based generator
Philox (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"), on the CPU, so that they are the same on
any device and for any division of the global batch among processes.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

ROUNDS = 8


class Purpose(IntEnum):
    """What a stream of draws is for; each has its own Philox key, so adding one leaves the others as they are."""

    NOISE = 0
    TIMESTEPS = 1
    FLIP = 2
    CROP_TOP = 3
    CROP_LEFT = 4
    VALIDATION_NOISE = 16
    VALIDATION_TIMESTEPS = 17


def sample_indices(positions: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """The dataset indices at `positions` (any shape, int64, counted from the start of training) of the endless order.

    Position q is place q % N of epoch q // N; every epoch is a permutation of range(N) of its own.
    """
    epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), num_samples)
    indices = _permute(places, epochs, num_samples, seed)
    outside = indices >= num_samples
    while outside.any():  # cycle walking: the domain exceeds N by at most 2 sqrt(N) + 1
        indices[outside] = _permute(indices[outside], epochs[outside], num_samples, seed)
        outside = indices >= num_samples
    return indices


def uniform_draws(seed: int, step: int, purpose: Purpose, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64: one for each row of the global batch of optimizer step `step`."""
    return _philox(seed, step, purpose).random(count)


def normal_draws(
    seed: int, step: int, rows: Sequence[int], shape: tuple[int, ...], purpose: Purpose = Purpose.NOISE
) -> np.ndarray:
    """Standard normal noise (len(rows), *shape) float32 for `rows` of the global batch of optimizer step `step`."""
    noise = np.empty((len(rows), *shape), dtype=np.float32)
    for out, row in zip(noise, rows, strict=True):
        _philox(seed, step, purpose, row).standard_normal(dtype=np.float32, out=out)
    return noise


def _philox(seed: int, step: int, purpose: Purpose, row: int = 0) -> np.random.Generator:
    # The lowest counter word is left to the stream itself: 2**64 blocks before it could meet its neighbour.
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, int(purpose)], counter=[0, row, step, 0]))


def _permute(places: np.ndarray, epochs: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """One pass of the Feistel network over side x side >= N; places and epochs are int64 of one shape."""
    side = np.uint64(int(np.ceil(np.sqrt(num_samples))))
    left, right = np.divmod(places.astype(np.uint64), side)
    epoch_key = _mix(epochs.astype(np.uint64) + _mix(np.full((), seed % 2**64, dtype=np.uint64)))
    for round_number in range(ROUNDS):
        round_key = _mix(epoch_key + np.uint64(round_number + 1))
        left, right = right, (left + _mix(right + round_key)) % side
    return (left * side + right).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al. 2014): a bijection of 64-bit words that spreads every input bit."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
