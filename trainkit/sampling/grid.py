"""Image grids, with names of rows or captions, and PNG files."""

# N images, H/W pixels, C channels (1 grey, 3 RGB, 4 RGBA)

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from trainkit.atomic import replacing

MINIMUM_WIDTH = 400
ROW_NAME_WIDTH = 150  # pixels, at most
CAPTION_SIZE, CAPTION_LINES, CAPTION_WIDTH = 11, 2, 88  # pixels of a letter; lines; width of a cell, at least
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_pil(image: np.ndarray) -> Image.Image:
    """A picture of mode L, RGB or RGBA from (H, W, C) uint8 with 1, 3 or 4 channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def image_grid(
    images: np.ndarray,
    columns: int | None = None,
    padding: int = 2,
    background: str = "white",
    row_names: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """A grid of `images` (N, H, W, C) uint8, filled row by row, by default about square.

    Small images are enlarged by an integer factor, so that the images are at least `MINIMUM_WIDTH` pixels wide
    together, and each `CAPTION_WIDTH` with `captions`. `row_names` are written to the left of the rows and `captions`
    (N) below the images, shortened to fit. `padding` is in pixels of the picture. Transparent images keep their alpha.
    """
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count * height / width))
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    available = max(MINIMUM_WIDTH - padding * (columns + 1), CAPTION_WIDTH * columns if captions else 0)
    scale = max(1, math.ceil(available / (columns * width)))
    names = _RowNames(row_names or (), height * scale)
    text_width = width * scale - 6  # between one caption and the next
    num_lines = _num_lines(captions or (), text_width)
    below = num_lines * (CAPTION_SIZE + 3)
    left, cell_width, cell_height = names.width, width * scale + padding, height * scale + padding + below
    grid = Image.new(
        MODES[channels], (left + columns * cell_width + padding, rows * cell_height + padding), background
    )
    draw, ink = ImageDraw.Draw(grid), _ink(background)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        x, y = left + padding + column * cell_width, padding + row * cell_height
        cell = to_pil(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(cell, (x, y))
        if captions:
            lines = _lines(captions[index], text_width, num_lines)
            draw.text((x, y + height * scale + 1), "\n".join(lines), ink, _font(CAPTION_SIZE), spacing=2)
    for row, name in enumerate(names.texts[:rows]):
        middle = padding + row * cell_height + height * scale // 2
        draw.text((left - 4, middle), name, ink, names.font, anchor="rm")
    return grid


class _RowNames:
    """The names of rows that are `height` pixels high: the font, the texts that fit, and the width they take."""

    def __init__(self, names: Sequence[str], height: int):
        self.font = _font(max(11, min(16, height // 2)))
        self.texts = [_shortened(name, self.font, ROW_NAME_WIDTH) for name in names]
        self.width = round(max((self.font.getlength(text) for text in self.texts), default=-8)) + 8


def _num_lines(captions: Sequence[str], width: int) -> int:
    """The lines of `width` pixels that the longest of `captions` takes, `CAPTION_LINES` at most."""
    longest = max((_font(CAPTION_SIZE).getlength(text) for text in captions), default=0.0)
    return min(CAPTION_LINES, math.ceil(longest / width))


def _lines(text: str, width: int, num_lines: int) -> list[str]:
    """`text` in at most `num_lines` lines of `width` pixels, the last one shortened."""
    font, words, lines = _font(CAPTION_SIZE), text.split(), []
    for number in range(num_lines):
        line = ""
        while words and (not line or font.getlength(f"{line} {words[0]}") <= width):
            line = f"{line} {words.pop(0)}".strip()
        if number == num_lines - 1 and words:
            line = f"{line} {' '.join(words)}"
        lines.append(_shortened(line, font, width))
    return lines


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text` on one line, cut to `width` pixels with an ellipsis."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which has Latin, Greek, Cyrillic and more, and comes with matplotlib."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _ink(background: str) -> str:
    return "black" if sum(ImageColor.getrgb(background)[:3]) > 384 else "white"


def save_image(image: Image.Image, path: Path) -> None:
    """Write `image` as PNG under a temporary name, then rename it to `path`."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
