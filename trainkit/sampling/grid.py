"""Image grids, and PNG files."""

# N images, H/W pixels, C channels (1 grey, 3 RGB, 4 RGBA)

import math
from pathlib import Path

import numpy as np
from PIL import Image

from trainkit.atomic import replacing

MINIMUM_WIDTH = 400


def to_pil(image: np.ndarray) -> Image.Image:
    """A picture of mode L, RGB or RGBA from (H, W, C) uint8 with 1, 3 or 4 channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def image_grid(
    images: np.ndarray, columns: int | None = None, padding: int = 2, background: str = "white"
) -> Image.Image:
    """A grid of `images` (N, H, W, C) uint8, filled row by row, by default about square.

    Small images are enlarged by an integer factor, so that the grid is at least `MINIMUM_WIDTH` pixels wide. `padding`
    is in pixels of the picture. Transparent images keep their alpha.
    """
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count * height / width))
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    available = MINIMUM_WIDTH - padding * (columns + 1)
    scale = max(1, math.ceil(available / (columns * width)))
    cell_width, cell_height = width * scale + padding, height * scale + padding
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    grid = Image.new(mode, (columns * cell_width + padding, rows * cell_height + padding), background)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        cell = to_pil(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(cell, (padding + column * cell_width, padding + row * cell_height))
    return grid


def save_image(image: Image.Image, path: Path) -> None:
    """Write `image` as PNG under a temporary name, then rename it to `path`."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
