"""Features of a set of images, computed once per extractor and kept next to a prepared dataset or in the cache."""

# N images, D dimensions of a feature

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainkit.atomic import replacing
from trainkit.data.files import cache_root
from trainkit.errors import UserError
from trainkit.evaluation.features import ROUNDED_RESIZE, FeatureExtractor, extract_features
from trainkit.evaluation.images import ImageSet, PreparedFolder
from trainkit.evaluation.metrics import KID_SUBSET_SIZE
from trainkit.processes import wait_for_everyone
from trainkit.terminal import Progress, warn

OTHER_SIZE = 1.5  # times as many pixels along a side: resizing then blurs one side more than the other
WARN_BELOW = 100  # images on a side: KID's subsets are then smaller than 50
FORMAT = 1  # increase it when the same images and extractor would give other features
FOLDER = ".features"  # in a prepared dataset


class ScoredImages(NamedTuple):
    """Features (N, D) of the images `indices` (N,) of a set; unreadable images are left out."""

    images: ImageSet
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
    accelerator: Accelerator,
    side: str,
) -> ScoredImages:
    """The features of `images[indices]` on every process, with its progress named after `side`. A collective.

    Each process computes its share. `batch_size` is per process.
    """
    own = indices[accelerator.process_index :: accelerator.num_processes]
    rounded = extractor.resize == ROUNDED_RESIZE
    batches: Iterable[np.ndarray] = images.batches(own, batch_size, extractor.input_size, rounded)
    with Progress(f"{side} features", len(own), "images", hidden=not accelerator.is_main_process) as progress:
        features = extract_features(extractor, progress.count(batches), accelerator.device)
    kept = np.array([index for index in own.tolist() if index not in images.unreadable], dtype=np.int64)
    wait_for_everyone()  # shares of one size may take very different times
    parts = gather_object([(features, kept, images.unreadable)])
    for _, _, unreadable in parts:
        images.unreadable.update(unreadable)
    kept = np.concatenate([part[1] for part in parts])
    order = np.argsort(kept)
    return ScoredImages(images, torch.cat([part[0] for part in parts])[order], kept[order])


def reference_features(
    images: ImageSet,
    indices: np.ndarray,
    extractor: FeatureExtractor,
    batch_size: int,
    accelerator: Accelerator,
    cache_dir: str | None,
) -> ScoredImages:
    """As `score_images`, from a file that an earlier call wrote for the same images, indices and weights.

    A changed image changes the name of the file, so old features are never used. The file is stored in the prepared
    dataset if that is writable, otherwise in the cache.
    """
    parts = FORMAT, images.fingerprint, extractor.weights_sha256, extractor.input_size, extractor.resize
    name = hashlib.sha256(repr((*parts, indices.tobytes())).encode()).hexdigest()[:24] + ".safetensors"
    folders = [cache_root(cache_dir) / "features"]
    if isinstance(images, PreparedFolder) and isinstance(images.folder, Path):
        folders.insert(0, images.folder / FOLDER)
    stored = next((read for folder in folders if (read := _read(folder / name)) is not None), None)
    wait_for_everyone()
    everywhere = all(gather_object([stored is not None]))  # a collective, so every process takes the same branch
    if stored is not None and everywhere:
        return ScoredImages(images, *stored)
    found = score_images(images, indices, extractor, batch_size, accelerator, "reference")
    if accelerator.is_main_process and not images.unreadable:  # a run with unreadable images reports them each time
        _store(found, folders, name)
    return found


def check_count(side: str, count: int) -> None:
    """Raise `UserError` for fewer images than any score needs."""
    least = 2 if side == "generated" else 4
    if count < least:
        raise UserError(f"--{side}: {count} images are too few for a score; give at least {least} that can be read")


def warn_of_few_images(metrics: list[str], *counts: int) -> None:
    """Print a warning if KID is computed from so few images on one side that differences mean little."""
    smaller = min(counts)
    if "kid" in metrics and smaller < WARN_BELOW:
        warn(
            f"KID of {smaller} images uses subsets of {max(2, smaller // 2)} (usual: {KID_SUBSET_SIZE:,}): its "
            "standard error is too small, and small differences mean nothing"
        )


def warn_of_other_size(reference: ImageSet, side: int) -> None:
    """Print a warning if the images to score, of `side` pixels, are much smaller or larger than the reference."""
    ratio = reference.side / side
    if max(ratio, 1 / ratio) >= OTHER_SIZE:
        warn(
            f"the reference has images of {reference.side} pixels and the images to score have {side}: the scores "
            "measure how sharp they are more than anything else; give a --reference that prepare_dataset.py has "
            f"prepared at --resolution {side}"
        )


def _read(file: Path) -> tuple[Tensor, np.ndarray] | None:
    """Features and indices in `file`; None if there is no such file, or a damaged one."""
    try:
        with safe_open(file, "pt") as stored:
            return stored.get_tensor("features"), stored.get_tensor("indices").numpy()
    except (OSError, SafetensorError):
        return None


def _store(found: ScoredImages, folders: list[Path], name: str) -> None:
    """Write `name` in the first of `folders` that can be written, or nowhere: the scores do not depend on it."""
    for folder in folders:
        try:
            folder.mkdir(exist_ok=True, parents=True)
            with replacing(folder / name) as temporary:
                save_file({"features": found.features, "indices": torch.from_numpy(found.indices)}, temporary)
            return
        except (OSError, SafetensorError):  # read-only or full
            continue
