"""Masks for inpainting: random boxes and brush strokes, as numbers of a generator alone.

Half of the masks are boxes, half are strokes, similar to those of Palette (Saharia et al. 2022, appendix D). No mask
is empty, and none covers more than `MAX_COVERED` of the image.
"""

# H/W height and width of the mask

import numpy as np
from PIL import Image, ImageDraw

MAX_BOXES, MAX_STROKES, MAX_TURNS = 2, 4, 6
BOX_SIDES = (0.2, 0.6)  # of the sides of the image
STROKE_WIDTHS, STROKE_STEPS = (0.08, 0.25), (0.1, 0.5)  # of the shorter side
MAX_COVERED = 0.9


def draw_mask(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A mask (H, W) bool that is True where an image is to be generated."""
    while True:
        picture = Image.new("1", (width, height))
        draw = ImageDraw.Draw(picture)
        if generator.random() < 0.5:
            _draw_boxes(draw, generator, height, width)
        else:
            _draw_strokes(draw, generator, height, width)
        mask = np.array(picture)
        if mask.any() and mask.mean() <= MAX_COVERED:
            return mask


def _draw_boxes(draw: ImageDraw.ImageDraw, generator: np.random.Generator, height: int, width: int) -> None:
    for _ in range(generator.integers(1, MAX_BOXES, endpoint=True)):
        box_height, box_width = (
            max(1, round(side * share))
            for side, share in zip((height, width), generator.uniform(*BOX_SIDES, 2), strict=True)
        )
        top = int(generator.integers(0, height - box_height, endpoint=True))
        left = int(generator.integers(0, width - box_width, endpoint=True))
        draw.rectangle((left, top, left + box_width - 1, top + box_height - 1), fill=1)


def _draw_strokes(draw: ImageDraw.ImageDraw, generator: np.random.Generator, height: int, width: int) -> None:
    """Lines with round ends that turn by a little at each corner."""
    shorter = min(height, width)
    for _ in range(generator.integers(1, MAX_STROKES, endpoint=True)):
        x, y = generator.uniform(0, width), generator.uniform(0, height)
        angle, thickness = generator.uniform(0, 2 * np.pi), shorter * generator.uniform(*STROKE_WIDTHS)
        radius = thickness / 2
        for _ in range(generator.integers(1, MAX_TURNS, endpoint=True)):
            length = shorter * generator.uniform(*STROKE_STEPS)
            next_x = np.clip(x + length * np.cos(angle), 0, width)
            next_y = np.clip(y + length * np.sin(angle), 0, height)
            draw.line((x, y, next_x, next_y), fill=1, width=max(1, round(thickness)))
            for end_x, end_y in ((x, y), (next_x, next_y)):
                draw.ellipse((end_x - radius, end_y - radius, end_x + radius, end_y + radius), fill=1)
            x, y, angle = next_x, next_y, angle + generator.uniform(-np.pi / 2, np.pi / 2)
