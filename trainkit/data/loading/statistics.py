"""Mean and deviation of the vectors of a prepared dataset, computed once and then read from the cache."""

import json
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from trainkit.atomic import write_text
from trainkit.data.files import cache_root
from trainkit.errors import UserError

# D numbers of a vector


class ImagesWithVectors(Protocol):
    """Prepared images or their latents."""

    fingerprint: str

    def column(self, name: str) -> Iterator[np.ndarray]: ...


def vector_statistics(images: ImagesWithVectors, options) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (D,) float32 of the vectors of `images`, from `--cache_dir` if it has them.

    All processes of a run may call this at the same time: they write the same file. Raises `UserError` if the cache
    cannot be written.
    """
    path = cache_root(options.cache_dir) / "vector_statistics" / f"{images.fingerprint}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return np.asarray(kept["mean"], np.float32), np.asarray(kept["std"], np.float32)
    except (OSError, ValueError, KeyError):
        pass
    mean, std = mean_and_std(images.column("vector"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"mean": mean.tolist(), "std": std.tolist()}))
    except OSError as error:
        raise UserError(f"--cache_dir {path} cannot be written ({error.strerror}): choose another folder") from None
    return mean, std


def mean_and_std(batches: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (D,) float32 over the rows of all `batches` (n, D), in one pass.

    Sums of squares are about the mean of each batch (Chan et al. 1979), so large means lose no digits. A number that
    is the same in all rows gets a deviation of 1.
    """
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for batch in batches:
        rows = batch.astype(np.float64)
        own_mean, total = rows.mean(0), count + len(rows)
        shift = own_mean - mean
        mean = mean + shift * (len(rows) / total)
        squares = squares + ((rows - own_mean) ** 2).sum(0) + shift**2 * (count * len(rows) / total)
        count = total
    std = np.sqrt(squares / count)
    std[std <= 1e-7 * np.abs(mean)] = 1.0
    return mean.astype(np.float32), std.astype(np.float32)
