"""Features of a set of images, computed once per extractor and kept next to a prepared dataset or in the cache."""

# N images, D dimensions of a feature

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from trainkit.atomic import replacing
from trainkit.data.files import cache_root
from trainkit.errors import UserError
from trainkit.evaluation.features import RESIZE, FeatureExtractor, extract_features
from trainkit.evaluation.images import ImageSet, PreparedFolder

FORMAT = 1  # increase it when the same images and extractor would give other features
FOLDER = ".features"  # in a prepared dataset


class ScoredImages(NamedTuple):
    """Features (N, D) of the images `indices` (N,) of a set; unreadable images are left out."""

    features: Tensor
    indices: np.ndarray


def choose_images(images: ImageSet, side: str, num_images: int | None, seed: int) -> np.ndarray:
    """Sorted indices of at most `num_images` images, drawn by `seed`. Raises `UserError` if there are too few."""
    count = min(len(images), num_images or len(images))
    check_count(side, count)
    return np.sort(np.random.default_rng(seed).permutation(len(images))[:count])


def score_images(
    images: ImageSet,
    indices: np.ndarray,
    extractor: FeatureExtractor,
    batch_size: int,
    device: torch.device,
    side: str,
) -> ScoredImages:
    """The features of `images[indices]`, with a progress bar named after `side`."""
    batches: Iterable[np.ndarray] = images.batches(indices, batch_size, extractor.input_size)
    batches = tqdm(batches, total=-(-len(indices) // batch_size), desc=f"{side} features")
    features = extract_features(extractor, batches, device)
    return ScoredImages(features, np.array([index for index in indices.tolist() if index not in images.unreadable]))


def reference_features(
    images: ImageSet,
    indices: np.ndarray,
    extractor: FeatureExtractor,
    batch_size: int,
    device: torch.device,
    cache_dir: str | None,
) -> ScoredImages:
    """As `score_images`, from a file that an earlier call wrote for the same images, indices and weights.

    A changed image changes the name of the file, so old features are never used. The file is stored in the prepared
    dataset if that is writable, otherwise in the cache.
    """
    parts = FORMAT, images.fingerprint, extractor.weights_sha256, extractor.input_size, RESIZE, indices.tobytes()
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:24] + ".safetensors"
    folders = [cache_root(cache_dir) / "features"]
    if isinstance(images, PreparedFolder) and isinstance(images.folder, Path):
        folders.insert(0, images.folder / FOLDER)
    for folder in folders:
        if (found := _read(folder / name)) is not None:
            return found
    found = score_images(images, indices, extractor, batch_size, device, "reference")
    if images.unreadable:
        return found  # so that each run reports them
    for folder in folders:
        try:
            folder.mkdir(exist_ok=True, parents=True)
            with replacing(folder / name) as temporary:
                save_file({"features": found.features, "indices": torch.from_numpy(found.indices)}, temporary)
            break
        except OSError:  # read-only or full: the next folder, or no cache
            continue
    return found


def check_count(side: str, count: int) -> None:
    """Raise `UserError` for fewer images than any score needs."""
    least = 2 if side == "generated" else 4
    if count < least:
        raise UserError(f"--{side}: {count} images are too few for a score; give at least {least} that can be read")


def _read(file: Path) -> ScoredImages | None:
    try:
        with safe_open(file, "pt") as stored:
            return ScoredImages(stored.get_tensor("features"), stored.get_tensor("indices").numpy())
    except (OSError, SafetensorError):
        return None
