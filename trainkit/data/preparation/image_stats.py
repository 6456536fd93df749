"""Statistics of an image's pixels: their hash, a perceptual hash, and their sums."""

# N images, C channels, pixels in HWC order

import hashlib
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from trainkit.data.preparation.filtering import NEAR_FLAG, NO_HASH, FilterSettings
from trainkit.packages import load_package

HASH_SIDE, FLAT_STD = 32, 2.0  # pixels that pHash reads; grey levels (0 to 255) below which an image is flat
EXACT_PIXELS = 2**20  # the squares of this many 16-bit samples add up to less than 2**53
STATS_SCHEMA = pa.schema(
    {
        "side": pa.uint8(),
        "content_hash": pa.binary(16),
        "perceptual_hash": pa.uint64(),
        "num_pixels": pa.int64(),
        "sums": pa.list_(pa.uint64()),
        "squares": pa.list_(pa.uint64()),
        "label": pa.int64(),
        "source": pa.string(),
    }
)


class ImageStats(NamedTuple):
    """Statistics of the stored pixels of one image; all integers are exact."""

    content_hash: str  # 32 hex digits of the stored pixels and their shape; empty if no filter needs it
    perceptual_hash: int
    num_pixels: int
    sums: list[int]  # (C,) of the samples, and of their squares
    squares: list[int]


def image_stats(pixels: np.ndarray, filters: FilterSettings) -> ImageStats:
    """Return the statistics of an image (H, W, C) uint8 or uint16 as stored, before a lossy encoding."""
    height, width, channels = pixels.shape
    content_hash = ""
    if filters.needs_content_hash:
        digest = hashlib.blake2b(f"{height} {width} {channels} {pixels.dtype}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(pixels).data)
        content_hash = digest.hexdigest()
    sums, squares = _exact_sums(pixels.reshape(-1, channels))
    near_hash = perceptual_hash(pixels) if filters.deduplicate == "near" else 0
    return ImageStats(content_hash, near_hash, height * width, sums, squares)


def _exact_sums(samples: np.ndarray) -> tuple[list[int], list[int]]:
    """Sums (C,) of the samples (pixels, C) and of their squares, in parts that float64 adds up without rounding."""
    sums, squares = [0] * samples.shape[1], [0] * samples.shape[1]
    for start in range(0, len(samples), EXACT_PIXELS):
        planes = samples[start : start + EXACT_PIXELS].T.astype(np.float64, order="C")
        sums = [so_far + int(more) for so_far, more in zip(sums, planes.sum(axis=1), strict=True)]
        more_squares = np.einsum("cp,cp->c", planes, planes)
        squares = [so_far + int(more) for so_far, more in zip(squares, more_squares, strict=True)]
    return sums, squares


def perceptual_hash(pixels: np.ndarray) -> int:
    """Return the 64-bit pHash (imagehash) of the image in grey, on white if transparent; `NO_HASH` for a flat one."""
    from PIL import Image

    imagehash = load_package("imagehash", NEAR_FLAG)

    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    small = np.asarray(image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.LANCZOS), dtype=np.float32)
    if small.std() < FLAT_STD:  # the hash would be that of the noise, or the same for every flat image
        return NO_HASH
    bits = imagehash.phash(image).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def stats_batch(
    splits: list[int], stats: list[ImageStats], labels: list[int | None], sources: list[str]
) -> pa.RecordBatch:
    """Return the statistics of a unit's images as a table, with the split, label and source of each."""
    rows = [(bytes.fromhex(image.content_hash), *image[1:]) for image in stats]
    columns: list[Any] = [splits, *(list(zip(*rows, strict=True)) or [()] * len(ImageStats._fields)), labels, sources]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, STATS_SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=STATS_SCHEMA)


def stats_digest(batch: pa.RecordBatch) -> str:
    """Return a hash of a unit's statistics: a unit changes if a file that could not be read is readable later."""
    return hashlib.blake2b(repr(batch.to_pydict()).encode(), digest_size=8).hexdigest()


def sum_stats(stats: Iterable[ImageStats]) -> dict:
    """Add up the pixels, and by channel the sums and sums of squares, exactly."""
    count = 0
    sums: list[int] = []
    squares: list[int] = []
    for image in stats:
        count += image.num_pixels
        sums = [a + b for a, b in itertools.zip_longest(sums, image.sums, fillvalue=0)]
        squares = [a + b for a, b in itertools.zip_longest(squares, image.squares, fillvalue=0)]
    return {"num_pixels": count, "sums": sums, "squares": squares}


def sum_totals(totals: Iterable[dict]) -> dict:
    return sum_stats(ImageStats("", 0, total["num_pixels"], total["sums"], total["squares"]) for total in totals)


def mean_and_std(total: dict, max_value: int) -> dict[str, list[float]]:
    """Return mean and deviation by channel of samples scaled to [0, 1], with only the last step rounded."""
    count = total["num_pixels"]
    pairs = list(zip(total["sums"], total["squares"], strict=True))
    variances = [(square * count - value * value) / (count * max_value) ** 2 for value, square in pairs]
    return {
        "mean": [round(value / (count * max_value), 8) for value, _ in pairs],
        "std": [round(math.sqrt(variance), 8) for variance in variances],
    }
