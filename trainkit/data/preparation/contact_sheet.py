"""A page to look at before training: samples of each class, duplicates beside what they repeat, what was rejected.

One HTML file with everything inside it. The same dataset gives the same page.
"""

# B batch, H/W height and width, C channels

import base64
import html
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from trainkit.data import faults
from trainkit.data.faults import RejectedImage
from trainkit.data.files import RemotePath, read_text, write_text
from trainkit.data.format import PREPARATION_NAME, REJECTED_NAME, format_counts
from trainkit.data.images.decode import FORMATS, decode_image
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation.pool import call_in_process, quiet_decoders
from trainkit.data.preparation.shards import ShardWriter

SHEET_NAME = "contact_sheet.html"
SEED = 0
SIDE = 128  # pixels, at most, of a picture on the page
CLASS_SAMPLES, SHOWN_CLASSES, UNLABELLED_SAMPLES = 12, 24, 96
SCANNED_LABELS = 20_000  # images whose class is looked up: enough for samples of any but the rarest
SHOWN_REJECTED = 12  # of each fault
# Of files of which there is something to see.
SHOWN_FAULTS = {
    faults.TRUNCATED, faults.CORRUPT, faults.TOO_SMALL, faults.BAD_ASPECT, faults.ANIMATED, faults.DUPLICATE
}  # fmt: skip
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; max-width: 1400px }
figure { display: inline-block; margin: 0 6px 10px 0; width: min-content; min-width: 100px; vertical-align: top;
  overflow-wrap: anywhere }
figcaption { font-size: 11px; color: #555; max-height: 5em; overflow: hidden }
img { min-width: 64px; image-rendering: pixelated; background: repeating-conic-gradient(#ccc 0 25%, #fff 0 50%)
  0 0 / 16px 16px }
td { padding: 2px 12px 2px 0; vertical-align: top; overflow-wrap: anywhere }
h2 { margin: 1.2em 0 .4em; font-size: 16px }
"""


def write_contact_sheet(folder: Path | RemotePath, source=None) -> Path | RemotePath:
    """Write `contact_sheet.html` into a prepared dataset, unless it is there and newer; returns its path.

    Pictures of duplicates and rejected files are read from `source`, where that is a folder of image files.
    """
    path = folder / SHEET_NAME
    if (
        isinstance(path, Path)
        and path.is_file()
        and path.stat().st_mtime_ns >= (folder / PREPARATION_NAME).stat().st_mtime_ns
    ):
        return path
    images = PreparedImages(folder)
    name = images.preparation["source"]["name"]
    body = [f"<h1>{_escaped(name)}</h1>", f"<p>{_escaped(format_counts(images.preparation))}</p>"]
    for title, indices in _samples(images):
        sources, texts = images.sources(indices), images.texts(indices)
        captions = [f"{source} {text}".strip() for source, text in zip(sources, texts, strict=True)]
        pictures = map(_encoded, images.gather(indices))
        figures = [_figure(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
        body += [f"<h2>{_escaped(title)}</h2>", *figures]
    body += _rejected_part(images, getattr(source, "folder", None))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += f"<title>{_escaped(name)}</title><style>{STYLE}</style>"
    write_text(path, "\n".join(["<!DOCTYPE html>", f"<html><head>{head}</head><body>", *body, "</body></html>", ""]))
    return path


def _samples(images: PreparedImages) -> list[tuple[str, np.ndarray]]:
    """Titles and image numbers, of each class where there are classes."""
    generator = np.random.default_rng(SEED)
    count = len(images)
    if images.label_names is None:
        chosen = np.sort(generator.choice(count, min(count, UNLABELLED_SAMPLES), replace=False))
        return [(f"{len(chosen)} of {count:,} images", chosen)]
    seen = np.sort(generator.choice(count, min(count, SCANNED_LABELS), replace=False))
    labels = images.labels(seen)
    counts = images.preparation["classes"]
    found = []
    for label in np.unique(labels).tolist():
        of_class = seen[labels == label]
        name = images.label_names[label] if label >= 0 else "no class"
        held = counts.get(name, count - sum(counts.values()))
        chosen = generator.choice(of_class, min(len(of_class), CLASS_SAMPLES), replace=False)
        found.append((f"{name}: {held:,}", np.sort(chosen)))
    if len(found) > SHOWN_CLASSES:
        found[SHOWN_CLASSES - 1] = (found[SHOWN_CLASSES - 1][0] + f" (and {len(found) - SHOWN_CLASSES} classes more)",
                                    found[SHOWN_CLASSES - 1][1])  # fmt: skip
    return found[:SHOWN_CLASSES]


def _rejected_part(images: PreparedImages, source_folder: Path | None) -> list[str]:
    by_fault: dict[str, list[dict]] = {}
    for line in _rejected_lines(images.folder / REJECTED_NAME):
        lines = by_fault.setdefault(line["fault"], [])
        if len(lines) < SHOWN_REJECTED:
            lines.append(line)
    paths = [
        source_folder / name
        for fault, lines in sorted(by_fault.items())
        if source_folder is not None and fault in SHOWN_FAULTS
        for line in lines
        for name in _names(line)
    ]
    reader = ShardWriter(None, images.settings, None, has_text=False)
    pictures = dict(zip(paths, call_in_process(reader, picture_of, paths), strict=True))
    parts = []
    for fault, lines in sorted(by_fault.items()):
        explained = " (left: what stays)" if fault == faults.DUPLICATE else ""
        count = images.preparation["rejected"].get(fault, 0)
        parts += [f"<h2>{_escaped(fault)}: {count:,}{explained}</h2>", "<table>"]
        for line in lines:
            found = [(pictures.get(source_folder / name), name) for name in _names(line)] if source_folder else []
            figures = [_figure(picture, name) for picture, name in found if isinstance(picture, bytes)]
            told = f"{_escaped(line['source'])}<br>{_escaped(line['message'])}"
            parts.append(f"<tr><td>{''.join(figures)}</td><td>{told}</td></tr>")
        parts.append("</table>")
    return parts


def _names(line: dict) -> list[str]:
    """The files that a line of rejected.jsonl is about: what stays first, where it tells of a duplicate."""
    return [line["repeats"], line["source"]] if line["fault"] == faults.DUPLICATE else [line["source"]]


def _rejected_lines(path: Path | RemotePath) -> Iterator[dict]:
    """A line at a time: there may be many."""
    if isinstance(path, Path):
        with open(path, encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    else:
        yield from map(json.loads, read_text(path).splitlines())


def picture_of(writer: ShardWriter, path: Path) -> bytes | None:
    """What can be seen of a file, encoded for the page: as it would have been prepared, else what its bytes give.

    For a worker process: such a file may kill it.
    """
    with quiet_decoders():
        try:
            return _encoded(decode_image(path, writer.settings))
        except RejectedImage:
            pass
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=FORMATS) as image:
                    image.thumbnail((SIDE, SIDE))
                    return _encoded(np.asarray(image.convert("RGBA")))
        except Exception:  # whatever a plugin raises on what is left of a file: then it has no picture
            return None
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False


def _figure(picture: bytes, caption: str) -> str:
    mime = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return (
        f'<figure><img src="data:image/{mime};base64,{base64.b64encode(picture).decode()}" alt="">'
        f"<figcaption>{_escaped(caption[:200])}</figcaption></figure>"
    )


def _encoded(pixels: np.ndarray) -> bytes:
    """An image (H, W, C) uint8 or uint16 as a PNG, or as a JPEG where that is far smaller."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    is_large = max(image.size) > SIDE // 2
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    if is_large and image.mode != "RGBA":
        image.save(buffer, "JPEG", quality=88)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def _escaped(text: str) -> str:
    """A file may be called anything."""
    return html.escape(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
