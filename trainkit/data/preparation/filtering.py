"""Which images are kept: duplicates are found by hashes, and a fraction is held out for validation."""

# N images, M different hashes

import itertools
import math
from dataclasses import dataclass

import numpy as np

from trainkit.packages import load_package

HASH_BITS = 64
NO_HASH = 2**64 - 1  # of an image without a meaningful perceptual hash; at most half of the bits of others are set
KEPT = -1
NEAR_FLAG = "--deduplicate near"
TRAIN, VALIDATION = 0, 1


@dataclass(frozen=True)
class FilterSettings:
    """Which of the readable images are kept, and for which split."""

    deduplicate: str = "none"  # none, exact or near
    near_distance: int = 4  # maximum number of different bits
    validation_fraction: float = 0.0  # of the images, in [0, 1)

    @property
    def identity(self) -> tuple:
        """The values that the result depends on."""
        return (self.deduplicate, self.near_distance, self.validation_fraction), *self._hash_version

    @property
    def unit_key(self) -> tuple:
        """The values that the files of a unit depend on; the distance matters only once all units are done."""
        return self.deduplicate, self.validation_fraction, *self._hash_version

    @property
    def _hash_version(self) -> tuple[str, ...]:
        return ("flat images by pixels",) if self.deduplicate == "near" else ()

    @property
    def needs_content_hash(self) -> bool:
        return self.deduplicate != "none" or self.validation_fraction > 0

    @property
    def splits(self) -> tuple[int, ...]:
        return (TRAIN, VALIDATION) if self.validation_fraction else (TRAIN,)


NO_FILTERS = FilterSettings()


def filters_from_options(options) -> FilterSettings:
    """Return the filters of a script's `FilterOptions`. Raises `UserError` naming the flag."""
    if options.deduplicate == "near":
        load_package("imagehash", NEAR_FLAG)
    distance = options.near_distance if options.deduplicate == "near" else FilterSettings.near_distance
    return FilterSettings(options.deduplicate, distance, options.validation_fraction)


def is_held_out(content_hash: str, fraction: float) -> bool:
    """Return whether an image is held out for validation. Its pixels alone decide, so it never changes splits."""
    return int(content_hash[:16], 16) < fraction * 2**64


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Return for each image (N,) the first one of the same hash (N, K) uint64, or `KEPT` for that one itself."""
    firsts = _first_equal(hashes)
    firsts[firsts == np.arange(len(firsts))] = KEPT
    return firsts


def duplicates_by_look(hashes: np.ndarray, content_hashes: np.ndarray, distance: int) -> np.ndarray:
    """Return for each image (N,) the first kept one that looks the same, else `KEPT`.

    `hashes` (N,) uint64 are perceptual hashes, `content_hashes` (N, 2) uint64 hashes of the pixels. Images
    without a meaningful perceptual hash (`NO_HASH`: flat ones) are duplicates only if their pixels are equal.
    """
    repeated = np.full(len(hashes), KEPT, dtype=np.int64)
    for chosen, find in (
        (hashes != NO_HASH, lambda rows: near_duplicates(hashes[rows], distance)),
        (hashes == NO_HASH, lambda rows: exact_duplicates(content_hashes[rows])),
    ):
        rows = np.flatnonzero(chosen)
        firsts = find(rows)
        repeated[rows] = np.where(firsts == KEPT, KEPT, rows[firsts]) if len(rows) else KEPT
    return repeated


def near_duplicates(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Return for each image (N,), in order, the first kept one within `distance` bits of its hash, else `KEPT`.

    An image is dropped only if a kept one is near it. So there are no chains in which each is near the next and the
    last is not like the first.
    """
    firsts = _first_equal(hashes[:, None])
    different = np.flatnonzero(firsts == np.arange(len(firsts)))
    dropped: dict[int, int] = {}
    for later, earlier in near_pairs(hashes[different], distance).tolist():
        if later not in dropped and earlier not in dropped:
            dropped[later] = earlier
    stays = np.arange(len(firsts))
    stays[different[np.array(list(dropped), dtype=np.int64)]] = different[
        np.array(list(dropped.values()), dtype=np.int64)
    ]
    repeated = stays[firsts]
    repeated[repeated == np.arange(len(firsts))] = KEPT
    return repeated


def _first_equal(hashes: np.ndarray) -> np.ndarray:
    """Return for each row (N, K) the number of the first row that is equal to it."""
    order = np.lexsort(hashes.T)  # stable: the first of several equal rows stays first
    starts = np.ones(len(order), dtype=bool)
    ordered = hashes[order]
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    del ordered  # each of these takes a gigabyte for a hundred million images
    starts = np.flatnonzero(starts)
    firsts = np.empty(len(order), dtype=np.int64)
    firsts[order] = np.repeat(order[starts], np.diff(starts, append=len(order)))
    return firsts


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Return all pairs (later, earlier) of different hashes (M,) uint64 at most `distance` bits apart, sorted.

    The result is exact, but not all pairs are compared. If the hashes are cut into b blocks of bits, two such hashes
    agree in at least b - distance whole blocks. For each choice of that many blocks, the hashes are sorted by them,
    and only equal ones are compared.
    """
    num_blocks = _num_blocks(len(hashes), distance)
    bounds = np.linspace(0, HASH_BITS, num_blocks + 1).astype(int).tolist()
    masks = [((1 << (end - start)) - 1) << start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    found = [np.empty((0, 2), dtype=np.int64)]
    for chosen in itertools.combinations(masks, num_blocks - distance):
        keys = hashes & np.uint64(sum(chosen))
        order = np.argsort(keys)
        keys, ordered = keys[order], hashes[order]
        here, step = np.nonzero(keys[1:] == keys[:-1])[0], 1
        while len(here):
            near = here[np.bitwise_count(ordered[here] ^ ordered[here + step]) <= distance]
            found.append(np.sort(np.stack([order[near], order[near + step]], axis=1), axis=1)[:, ::-1])
            step += 1
            here = here[here + step < len(keys)]
            here = here[keys[here] == keys[here + step]]
    return np.unique(np.concatenate(found), axis=0)


def _num_blocks(num_hashes: int, distance: int) -> int:
    """Return the number of blocks with the fewest comparisons: few blocks need few sorts, but match more by chance."""
    sort_cost = 4 * math.log2(num_hashes + 2)

    def cost(blocks: int) -> float:
        key_bits = HASH_BITS * (blocks - distance) // blocks
        return math.comb(blocks, distance) * (sort_cost + num_hashes / 2**key_bits)

    return min(range(distance + 1, distance + 6), key=cost)
