"""An order of samples with balanced classes, as a pure function of the seed and the position.

An epoch still has as many positions as there are images. Each class gets a share of them, which is the same in every
epoch. A keyed permutation places these shares, and the images of a class follow one another in endless permutations.
So no image of a class repeats before all others of the class were used, and there is no state to save: a resume
computes the image at its position.

N images, K classes.
"""

import numpy as np

from trainkit.data.format import NO_LABEL
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.order import SampleOrder, sample_indices
from trainkit.errors import UserError


def balanced_order(images: PreparedImages, options) -> "ClassBalancedOrder | None":
    """Return the order of `--class_balance`; None if every image is used once per epoch.

    Raises `UserError` if the images have no classes, or if blocks are requested too.
    """
    balance = options.class_balance
    if balance == "none":
        return None
    if options.shuffle_block_size:
        raise UserError(
            f"--class_balance {balance} picks images one by one, --shuffle_block_size {options.shuffle_block_size} in "
            "blocks: leave one of the two out"
        )
    if images.label_names is None:
        raise UserError(f"--class_balance {balance} needs images with classes, and these have none: leave it out")
    return ClassBalancedOrder(read_labels(images), len(images.label_names), options.seed, balance)


def read_labels(images: PreparedImages) -> np.ndarray:
    """Return the class numbers of all images (N,) int32, in one pass over that column."""
    if images.label_names is None:
        return np.full(len(images), NO_LABEL, dtype=np.int32)
    return np.concatenate([labels.astype(np.int32) for labels in images.column("label")])


def class_shares(counts: np.ndarray, balance: str) -> np.ndarray:
    """Return the positions per epoch (K,) int64 of classes with `counts` (K,) images; their sum is that of `counts`.

    none     the number of images of the class
    sqrt     in proportion to the square root of that number, as Mahajan et al. 2018 sample hashtags
    inverse  the same for every class that has images
    """
    power = {"none": 1.0, "sqrt": 0.5, "inverse": 0.0}[balance]
    weights = np.where(counts > 0, np.maximum(counts, 1) ** power, 0.0)
    total = int(counts.sum())
    exact = total * weights / weights.sum()
    shares = np.floor(exact).astype(np.int64)
    largest_rest = np.argsort(shares - exact, kind="stable")[: total - shares.sum()]
    shares[largest_rest] += 1
    return shares


class ClassBalancedOrder:
    """The endless order of images with class numbers `labels` (N,), with classes balanced by `balance`.

    Images without a known class keep their number of positions. Uses 4 bytes of memory per image.
    """

    block_size = 0  # there is nothing to read ahead in blocks

    def __init__(self, labels: np.ndarray, num_classes: int, seed: int, balance: str):
        self.num_samples, self.seed = len(labels), seed
        numbers = np.where(labels == NO_LABEL, num_classes, labels)
        self.counts = np.bincount(numbers, minlength=num_classes + 1)
        known = class_shares(self.counts[:-1], balance)
        self.shares = np.append(known, self.counts[-1])
        self._rows = np.argsort(numbers, kind="stable").astype(np.uint32)  # class by class
        self._first_rows = np.append(0, np.cumsum(self.counts))
        self._first_slots = np.append(0, np.cumsum(self.shares))

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Return the images at `positions` (B,) int64, counted from the start of training."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs = positions // self.num_samples
        slots = sample_indices(positions, self.num_samples, self.seed)
        classes = np.searchsorted(self._first_slots, slots, side="right") - 1
        visits = epochs * self.shares[classes] + slots - self._first_slots[classes]
        found = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(classes).tolist():
            here = classes == number
            inside = SampleOrder(int(self.counts[number]), _seed_of(self.seed, number)).indices(visits[here])
            found[here] = self._rows[self._first_rows[number] + inside]
        return found


def _seed_of(seed: int, number: int) -> int:
    """Return a seed for the images of class `number` that is unlikely to be the seed of a run."""
    return (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
