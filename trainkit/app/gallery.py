"""Images as a piece of HTML: enlarged by whole factors without blur, each with its caption and its PNG to download.

Everything is inside, so the server keeps no files and visitors cannot see the images of others.
"""

# N images, H/W pixels, C channels

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from trainkit.data.loading.conditioning_images import label_colours
from trainkit.sampling.grid import image_grid, to_pil

CELL, HALF_PAGE_CELL = 112, 90  # pixels that small images are enlarged to, as near as a whole factor comes
PREVIEW_SIDE = 256  # maximum pixels of a preview that is sent while the chain runs
# The link takes the picture of its figure, so that each picture is sent once.
COPY_SOURCE = "this.href = this.closest('figure').querySelector('img').src"
STYLE = """
.tk-grid { display: flex; flex-wrap: wrap; gap: 12px 10px; align-items: flex-start }
.tk-grid figure { margin: 0; width: var(--tk-width); max-width: 100% }
.tk-grid img { display: block; width: 100%; height: auto; border: 1px solid var(--border-color-primary);
  border-radius: 4px; background: repeating-conic-gradient(#ccc 0 25%, #fff 0 50%) 0 0 / 16px 16px }
.tk-grid .tk-small { image-rendering: pixelated }
.tk-grid figcaption { display: flex; justify-content: space-between; align-items: baseline; gap: 6px;
  margin-top: 3px; font-size: 12px; line-height: 1.35; color: var(--body-text-color) }
.tk-grid figcaption span { overflow-wrap: anywhere; min-width: 0 }
.tk-grid a, .tk-foot a { margin: 0; padding: 0; font-size: inherit; line-height: inherit; white-space: nowrap;
  color: var(--link-text-color); text-decoration: none }
.tk-grid a:hover, .tk-foot a:hover { text-decoration: underline }
.tk-foot { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 16px; margin-top: 12px; font-size: 13px;
  color: var(--body-text-color) }
.tk-map { display: flex; gap: 12px; align-items: flex-start; padding: 10px; font-size: 12px;
  color: var(--body-text-color) }
.tk-map img { width: 112px; height: auto; image-rendering: pixelated; border-radius: 4px }
.tk-map ul { display: flex; flex-wrap: wrap; gap: 4px 12px; margin: 0; padding: 0; list-style: none }
.tk-map i { display: inline-block; width: 10px; height: 10px; margin-right: 5px; border-radius: 2px;
  border: 1px solid var(--border-color-primary) }
.tk-bar { height: 4px; margin: 0 0 12px; border-radius: 2px; background: var(--border-color-primary) }
.tk-bar div { height: 100%; border-radius: 2px; background: var(--color-accent) }
"""


def gallery(
    images: np.ndarray,
    seeds: Sequence[int],
    captions: Sequence[str],
    name: str,
    foot: str,
    fraction: float = 1.0,
    cell: int = CELL,
) -> str:
    """The HTML of `images` (N, H, W, C) uint8, about `cell` pixels wide or more, with their seeds and captions.

    Finished images (`fraction` 1) have links to their PNG and to that of the grid, in files that start with `name`.
    Before, a bar shows the fraction.
    """
    is_final, width = fraction >= 1, images.shape[2]
    scale = max(1, round(cell / width))
    small = ' class="tk-small"' if scale > 1 else ""
    figures = []
    for image, seed, caption in zip(images, seeds, captions, strict=False):  # those so far
        data = data_url(to_pil(image) if is_final else _preview(to_pil(image)))
        label = html.escape(f"seed {seed}" + (f" · {caption}" if caption else ""))
        link = f'<a href="#" onclick="{COPY_SOURCE}" download="{html.escape(name)}-seed-{seed}.png">PNG</a>'
        figures.append(
            f'<figure><img{small} src="{data}" alt="{label}" width="{width}" height="{images.shape[1]}">'
            f"<figcaption><span>{label}</span>{link if is_final else ''}</figcaption></figure>"
        )
    bar = "" if is_final else f'<div class="tk-bar"><div style="width: {fraction:.1%}"></div></div>'
    links = f"<span>{html.escape(foot)}</span>" + (_grid_link(images, name) if is_final else "")
    grid = f'<div class="tk-grid" style="--tk-width: {width * scale}px">{"".join(figures)}</div>'
    return f'{bar}{grid}<div class="tk-foot">{links}</div>'


def label_map(ids: np.ndarray, classes: int) -> str:
    """The HTML of a label map `ids` (H, W) in colours, and which id of the `classes` has which colour and share."""
    colours, counts = label_colours(classes), np.bincount(ids.reshape(-1), minlength=classes)
    entries = [
        f'<li><i style="background: rgb({red}, {green}, {blue})"></i>{number}: {counts[number] / ids.size:.0%}</li>'
        for number, (red, green, blue) in enumerate(colours.tolist())
        if counts[number]
    ]
    image = f'<img src="{data_url(to_pil(colours[ids]))}" alt="label map">'
    return f'<div class="tk-map">{image}<ul>{"".join(entries)}</ul></div>'


def _preview(image: Image.Image) -> Image.Image:
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return image


def _grid_link(images: np.ndarray, name: str) -> str:
    data = data_url(image_grid(images))
    return f'<a href="{data}" download="{html.escape(name)}-grid.png">Download all as a grid (PNG)</a>'


def data_url(image: Image.Image) -> str:
    """`image` as a PNG inside a URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
