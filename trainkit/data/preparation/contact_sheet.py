"""A page to look at before training: samples of each class, held-out images, duplicates and rejected files.

It is one HTML file with everything inside. The same dataset gives the same page.
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
from trainkit.data.files import RemotePath, exists, read_text, write_text
from trainkit.data.format import PREPARATION_NAME, REJECTED_NAME, VALIDATION_FOLDER, filters_of, format_counts
from trainkit.data.images.decode import FORMATS, decode_image
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation.pool import call_in_process, quiet_decoders
from trainkit.data.preparation.shards import ShardWriter
from trainkit.data.sources.folder import FolderReader
from trainkit.data.sources.source import Source
from trainkit.errors import one_line
from trainkit.terminal import warn

SHEET_NAME = "contact_sheet.html"
SEED = 0
SIDE = 128  # maximum pixels of an image on the page
CLASS_SAMPLES, SHOWN_CLASSES, UNLABELLED_SAMPLES = 12, 24, 96
SCANNED_LABELS = 20_000  # images whose class is read: enough for samples of all but the rarest classes
SHOWN_REJECTED = 12  # per fault
# Faults of files that can be shown.
SHOWN_FAULTS = {
    faults.TRUNCATED, faults.CORRUPT, faults.TOO_SMALL, faults.BAD_ASPECT, faults.ANIMATED, faults.DUPLICATE
}  # fmt: skip
OWN_MARK = '<meta name="generator" content="trainkit">'  # a file without it is not ours to replace
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; max-width: 1500px }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)); gap: 10px 8px }
.twelve { grid-template-columns: repeat(12, minmax(0, 1fr)) }
figure { margin: 0; min-width: 0; overflow-wrap: anywhere }
td figure { display: inline-block; width: min-content; min-width: 100px; margin-right: 8px }
figcaption { font-size: 11px; color: #555; max-height: 6.5em; overflow: hidden }
figcaption strong { display: block; font-weight: 600; color: #333 }
img { box-sizing: border-box; min-width: 64px; max-width: 100%; border: 1px solid #888; image-rendering: pixelated;
  background: repeating-conic-gradient(#ccc 0 25%, #fff 0 50%) 0 0 / 16px 16px }
td { padding: 2px 12px 2px 0; vertical-align: top; overflow-wrap: anywhere }
h2 { margin: 1.2em 0 .4em; font-size: 16px }
"""


def write_contact_sheet(folder: Path | RemotePath, source: Source | None = None) -> Path | RemotePath | None:
    """Write `contact_sheet.html` into a prepared dataset, unless it exists and is newer; returns its path.

    Images of duplicates and rejected files are read from `source` if that is a folder of image files. Returns None,
    after one printed line, if the file cannot be written or is not a contact sheet.
    """
    path = folder / SHEET_NAME
    if _is_foreign(path):
        warn(f"{path} is not a contact sheet and is kept: no contact sheet is written")
        return None
    if (
        isinstance(folder, Path)
        and isinstance(path, Path)
        and path.is_file()
        and path.stat().st_mtime_ns >= (folder / PREPARATION_NAME).stat().st_mtime_ns
    ):
        return path
    images = PreparedImages(folder)
    name = images.preparation["source"]["name"]
    body = [f"<h1>{_escaped(name)}</h1>", f"<p>{_escaped(format_counts(images.preparation))}</p>"]
    body += _sample_part(images)
    if filters_of(images.preparation).get("validation_fraction"):
        held_out = PreparedImages(folder / VALIDATION_FOLDER)
        body += [f"<h1>held out for validation: {len(held_out):,} images</h1>", *_sample_part(held_out)]
    body += _rejected_part(images, getattr(source, "folder", None))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8">{OWN_MARK}<meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += f"<title>{_escaped(name)}</title><style>{STYLE}</style>"
    page = "\n".join(["<!DOCTYPE html>", f"<html><head>{head}</head><body>", *body, "</body></html>", ""])
    try:
        write_text(path, page)
    except OSError as error:
        warn(f"{path} cannot be written ({one_line(error.strerror or error)})")
        return None
    return path


def _is_foreign(path: Path | RemotePath) -> bool:
    """Whether something other than a contact sheet has its name."""
    if not exists(path):
        return False
    try:
        return OWN_MARK not in read_text(path)[:1000]
    except (OSError, UnicodeDecodeError):
        return True


def _sample_part(images: PreparedImages) -> list[str]:
    """A grid of images per title, with the name and the caption of each."""
    parts, is_by_class = [], images.label_names is not None
    for title, indices in _samples(images):
        pictures = map(_encoded, images.gather(indices))
        about = zip(pictures, images.sources(indices), images.texts(indices), strict=True)
        figures = [_figure(picture, source, text) for picture, source, text in about]
        style = "row twelve" if is_by_class else "row"
        parts += [f"<h2>{_escaped(title)}</h2>", f'<div class="{style}">', *figures, "</div>"]
    return parts


def _samples(images: PreparedImages) -> list[tuple[str, np.ndarray]]:
    """Titles and image numbers: one entry per class if there are classes."""
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
        found[SHOWN_CLASSES - 1] = (found[SHOWN_CLASSES - 1][0] + f" (and {len(found) - SHOWN_CLASSES} more classes)",
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
    reader = ShardWriter(FolderReader("", {}), images.settings, None, has_text=False)
    pictures = dict(zip(paths, call_in_process(reader, picture_of, paths), strict=True))
    parts = []
    for fault, lines in sorted(by_fault.items()):
        explained = " (left: the image that is kept)" if fault == faults.DUPLICATE else ""
        count = images.preparation["rejected"].get(fault, 0)
        parts += [f"<h2>{_escaped(fault)}: {count:,}{explained}</h2>", "<table>"]
        for line in lines:
            found = [(pictures.get(source_folder / name), name) for name in _names(line)] if source_folder else []
            figures = [_figure(picture, name) for picture, name in found if isinstance(picture, bytes)]
            text = f"{_escaped(line['source'])}<br>{_escaped(line['message'])}"
            parts.append(f"<tr><td>{''.join(figures)}</td><td>{text}</td></tr>")
        parts.append("</table>")
    return parts


def _names(line: dict) -> list[str]:
    """The files that a line of rejected.jsonl is about; for a duplicate the image that is kept comes first."""
    return [line["repeats"], line["source"]] if line["fault"] == faults.DUPLICATE else [line["source"]]


def _rejected_lines(path: Path | RemotePath) -> Iterator[dict]:
    """Read one line at a time, since there may be many."""
    if isinstance(path, Path):
        with open(path, encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    else:
        yield from map(json.loads, read_text(path).splitlines())


def picture_of(writer: ShardWriter, path: Path) -> bytes | None:
    """Return an image file encoded for the page: as prepared, or else whatever can be decoded of it.

    Runs in a worker process: such a file may kill it.
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


def _figure(picture: bytes, name: str, caption: str = "") -> str:
    mime = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return (
        f'<figure><img src="data:image/{mime};base64,{base64.b64encode(picture).decode()}" alt="">'
        f"<figcaption><strong>{_escaped(name[:200])}</strong>{_escaped(caption[:200])}</figcaption></figure>"
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
