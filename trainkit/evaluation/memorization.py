"""Are samples copies of training images? Nearest training images in feature and in pixel space."""

# N training images, M samples, D dimensions of a feature, P pixels of a thumbnail

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainkit.atomic import replacing
from trainkit.errors import UserError, one_line
from trainkit.evaluation.images import ImageSet
from trainkit.evaluation.manifold import nearest
from trainkit.evaluation.reference import ScoredImages

THUMBNAIL_SIDE, PICTURE_SIDE, BATCH_SIZE = 32, 96, 256
QUANTILE = 0.01  # a sample is suspicious if it is nearer than 99 % of held-out images
CLOSEST_PAIRS = 16


class Pair(NamedTuple):
    """Indices of a sample and of its nearest reference image, and the distance of their features."""

    generated: int
    reference: int
    distance: float


def thumbnails(images: ImageSet, indices: np.ndarray) -> Tensor:
    """Pixels (N, P) float32 in [0, 1] of the images `indices`, resized to 32 x 32."""
    batches = [torch.from_numpy(batch).flatten(1) for batch in images.batches(indices, BATCH_SIZE, THUMBNAIL_SIDE)]
    return torch.cat(batches).float() / 255


def memorization(training: Tensor, generated: Tensor, held_out: Tensor | None) -> dict:
    """Distances from samples (M, D) to their nearest training images (N, D), and the share that is too near.

    A sample is too near if its distance is below that of 99 % of the held-out images. Without `held_out` images
    there is no such share. Equal images have distance 0; these are counted as `num_copies`.
    """
    distances, _ = nearest(generated, training)
    scale = training.double().std(dim=0).norm().item() or 1.0
    found = {
        "median_distance": distances.median().item(),
        "num_copies": int((distances <= 1e-5 * scale).sum()),
    }
    if held_out is not None and len(held_out):
        threshold = torch.quantile(nearest(held_out, training)[0], QUANTILE).item()
        found |= {"threshold": threshold, "num_held_out": len(held_out)}
        found["share_too_near"] = (distances < threshold).double().mean().item()
    return found


def closest_pairs(generated: ScoredImages, training: ScoredImages, num_pairs: int = CLOSEST_PAIRS) -> list[Pair]:
    """The samples whose features are nearest to a training image, with that image, closest first."""
    distances, rows = nearest(generated.features, training.features)
    order = distances.argsort(stable=True)[:num_pairs].tolist()
    return [
        Pair(int(generated.indices[row]), int(training.indices[rows[row]]), distances[row].item()) for row in order
    ]


def save_closest_pairs(file: Path, generated: ImageSet, training: ImageSet, pairs: list[Pair]) -> None:
    """Write a picture with a row of samples above a row of their nearest training images.

    Raises:
        UserError: the file cannot be written.
    """
    columns = (generated, [pair.generated for pair in pairs]), (training, [pair.reference for pair in pairs])
    rows = [
        np.concatenate(next(images.batches(np.array(indices), len(indices), PICTURE_SIDE)), axis=1)
        for images, indices in columns
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            Image.fromarray(np.concatenate(rows)).save(temporary)
    except OSError as error:
        raise UserError(f"--closest_pairs_file {file} cannot be written: {one_line(error)}") from None


def search_copies(
    made: ScoredImages,
    real: ScoredImages,
    held_out: ScoredImages | None,
    held_out_name: str | None,
    closest_pairs_file: str | None,
) -> dict | None:
    """Nearest reference images of the samples, in feature and in pixel space; None unless one of the last is given.

    Writes the picture `closest_pairs_file`.
    """
    if held_out is None and closest_pairs_file is None:
        return None
    found: dict = {"held_out": held_out_name}
    spare = None if held_out is None else held_out.features
    found["features"] = memorization(real.features, made.features, spare)
    spare = None if held_out is None else thumbnails(held_out.images, held_out.indices)
    found["pixels"] = memorization(thumbnails(real.images, real.indices), thumbnails(made.images, made.indices), spare)
    pairs = closest_pairs(made, real)
    found["closest_pairs"] = [pair._asdict() for pair in pairs]
    if closest_pairs_file is not None:
        save_closest_pairs(Path(closest_pairs_file), made.images, real.images, pairs)
    return found
