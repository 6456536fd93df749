"""Pictures inside a page: sample grids and images of a dataset, as data URIs within a limit of bytes."""

import base64
import functools
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from trainkit.data.format import read_preparation
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.order import sample_indices
from trainkit.sampling.grid import image_grid

SHOWN_GRIDS = 12
GRID_BYTES, GRID_SIDE = 120_000, 1024  # of an embedded grid, at most; pixels
PNG_VALUES = 1_000_000  # of a picture that is tried as a PNG, which takes long to compress
QUALITY, SMALLEST_SIDE = 85, 64
DATASET_IMAGES, DATASET_COLUMNS = 40, 10
DATASET_SIDE = 96  # pixels of a training image on the page, at most


class Grid(NamedTuple):
    """An embedded sample grid."""

    step: int
    uri: str
    width: int
    height: int


def sample_grids(folder: Path, limit: int = SHOWN_GRIDS) -> tuple[list[Grid], int]:
    """At most `limit` grids of samples/ evenly over the run, the first and the last among them; and their number.

    Files that are not readable pictures are left out.
    """
    paths = {int(path.stem): path for path in (folder / "samples").glob("*.png") if path.stem.isdecimal()}
    steps = sorted(paths)
    places = np.linspace(len(steps) - 1, 0, min(limit, len(steps))).round().astype(int)  # the last also if alone
    found = []
    for step in (steps[place] for place in places[::-1]):
        status = paths[step].stat()
        embedded = _embedded_file(paths[step], status.st_mtime_ns, status.st_size)
        if embedded is not None:
            found.append(Grid(step, *embedded))
    return found, len(steps)


@functools.lru_cache(maxsize=4 * SHOWN_GRIDS)  # a run writes its report many times, and a grid once
def _embedded_file(path: Path, mtime_ns: int, size: int) -> tuple[str, int, int] | None:
    try:
        with Image.open(path) as image:
            if size <= GRID_BYTES:
                return data_uri(path.read_bytes(), "png"), *image.size
            return embedded(image)
    except (OSError, ValueError):
        return None


def embedded(image: Image.Image) -> tuple[str, int, int]:
    """A picture as a data URI of at most about `GRID_BYTES`, its width and height: a PNG where that is enough."""
    image = image.copy()
    image.thumbnail((GRID_SIDE, GRID_SIDE))
    if image.width * image.height * len(image.getbands()) <= PNG_VALUES:
        content = _encoded(image, "PNG")
        if len(content) <= GRID_BYTES:
            return data_uri(content, "png"), *image.size
    image = _opaque(image)
    content = _encoded(image, "JPEG", quality=QUALITY)
    while len(content) > GRID_BYTES and min(image.size) > SMALLEST_SIDE:
        shrink = min(0.9, (GRID_BYTES / len(content)) ** 0.5)
        image = image.resize((max(1, int(image.width * shrink)), max(1, int(image.height * shrink))))
        content = _encoded(image, "JPEG", quality=QUALITY)
    return data_uri(content, "jpeg"), *image.size


def _opaque(image: Image.Image) -> Image.Image:
    """An RGB picture, over white where `image` is transparent."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(image: Image.Image, form: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


@functools.lru_cache(maxsize=8)
def dataset_grid(folder: str, fingerprint: str) -> tuple[str, int, int] | None:
    """A few images of a prepared dataset, drawn at random once and for all; None if it is no longer in `folder`."""
    preparation = read_preparation(Path(folder))
    if preparation is None or preparation.get("fingerprint") != fingerprint:
        return None
    images = PreparedImages(folder)
    indices = sample_indices(np.arange(min(DATASET_IMAGES, len(images))), len(images), 0)
    pixels = images.gather(indices)
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    return embedded(image_grid(_reduced(pixels, DATASET_SIDE), DATASET_COLUMNS))


def _reduced(images: np.ndarray, side: int) -> np.ndarray:
    """Images (N, H, W, C) uint8, each a whole number of times smaller, so that they have about `side` pixels."""
    count, height, width, channels = images.shape
    factor = max(1, max(height, width) // side)
    rows, columns = height // factor, width // factor
    cut = images[:, : rows * factor, : columns * factor]
    return cut.reshape(count, rows, factor, columns, factor, channels).mean(axis=(2, 4)).astype(np.uint8)
