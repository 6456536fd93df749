"""A page to look at before training: samples of each class, held-out images, duplicates and rejected files.

The same dataset gives the same page. contact_page.py has its look.
"""

# B batch, H/W height and width, C channels

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
from trainkit.data.loading.conditioning_images import ConditioningImages, side_by_side
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation.card import facts
from trainkit.data.preparation.contact_page import Fault, Figure, Grid, Part, contact_page
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
    held_out = None
    if filters_of(images.preparation).get("validation_fraction"):
        held_out = PreparedImages(folder / VALIDATION_FOLDER)
    page = contact_page(
        images.preparation["source"]["name"],
        format_counts(images.preparation),
        _summary(images, held_out),
        images.preparation["classes"],
        [*_sample_parts(images, held_out), *_rejected_parts(images, getattr(source, "folder", None))],
        OWN_MARK,
    )
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


def _summary(images: PreparedImages, held_out: PreparedImages | None) -> dict[str, str]:
    """The facts of the dataset without those that name its folder: a copy elsewhere has the same page."""
    about = facts(images.folder, images.preparation)
    for name in ("train", "held out", "classes"):  # classes have a part of their own
        about.pop(name, None)
    if held_out is not None:
        about = {"images": about.pop("images"), "held out": f"{len(held_out):,} more for validation"} | about
    return about


def _sample_parts(images: PreparedImages, held_out: PreparedImages | None) -> Iterator[Part]:
    """The parts of the page with samples of the images to train on, and of those that are held out."""
    yield Part("Images to train on", _grids(images))
    if held_out is not None:
        yield Part(f"Held out for validation: {len(held_out):,} images", _grids(held_out))


def _grids(images: PreparedImages) -> list[Grid]:
    """A grid of images per title, with the name and the caption of each."""
    grids = []
    conditions = None if images.pairs is None else ConditioningImages(images)
    for title, indices in _samples(images):
        pixels = images.gather(indices)
        if conditions is not None:  # beside its image
            pixels = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
            pixels = np.concatenate(side_by_side(conditions.shown(indices), pixels), axis=2)
        pictures = map(_encoded, pixels)
        about = zip(pictures, images.sources(indices), images.texts(indices), strict=True)
        grids.append(Grid(title, [Figure(picture, source, text) for picture, source, text in about]))
    return grids


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


def _rejected_parts(images: PreparedImages, source_folder: Path | None) -> Iterator[Part]:
    """The part of the page with rejected files, by fault; none if there are none."""
    by_fault: dict[str, list[dict]] = {}
    for line in _rejected_lines(images.folder / REJECTED_NAME):
        lines = by_fault.setdefault(line["fault"], [])
        if len(lines) < SHOWN_REJECTED:
            lines.append(line)
    if not by_fault:
        return
    paths = [
        source_folder / name
        for fault, lines in sorted(by_fault.items())
        if source_folder is not None and fault in SHOWN_FAULTS
        for line in lines
        for name in _names(line)
    ]
    reader = ShardWriter(FolderReader("", {}), images.settings, None, has_text=False)
    pictures = dict(zip(paths, call_in_process(reader, picture_of, paths), strict=True))
    faulty = []
    for fault, lines in sorted(by_fault.items()):
        explained = " (left: the image that is kept)" if fault == faults.DUPLICATE else ""
        count = images.preparation["rejected"].get(fault, 0)
        rows = []
        for line in lines:
            found = [(pictures.get(source_folder / name), name) for name in _names(line)] if source_folder else []
            figures = [Figure(picture, name) for picture, name in found if isinstance(picture, bytes)]
            rows.append((figures, line["source"], line["message"]))
        more = f"{count - len(lines):,} more are in {REJECTED_NAME}" if count > len(lines) else ""
        faulty.append(Fault(f"{fault}: {count:,}{explained}", rows, more))
    yield Part("Rejected files", faulty)


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
