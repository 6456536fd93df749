"""Limits that the header of an image must keep, and the faults of files that cannot be read."""

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from trainkit.data import faults
from trainkit.data.faults import RejectedImage
from trainkit.data.settings import PreparationSettings

WORKER_BYTES, BYTES_PER_PIXEL = 2**30, 64  # of memory: a worker alone; an image while it is converted to 16 bits


@contextlib.contextmanager
def pillow_limits(max_image_pixels: int) -> Iterator[None]:
    """Silence Pillow, and let it refuse more than `max_image_pixels` (0: no limit) before it allocates memory.

    This changes state of the whole process meanwhile, so it is for processes that do nothing else.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_image_pixels or None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def limit_memory(max_image_pixels: int) -> None:
    """Limit the memory of this process to what an image of `max_image_pixels` needs (0: no limit; Linux only).

    A file that needs more than its header says then raises MemoryError instead of killing a process.
    """
    if max_image_pixels == 0 or sys.platform != "linux":
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = WORKER_BYTES + BYTES_PER_PIXEL * max_image_pixels
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def check_header(image: Image.Image, settings: PreparationSettings) -> None:
    """Raise `RejectedImage` if the settings exclude an opened image, which is not decoded yet."""
    shorter, longer = sorted(image.size)
    size = f"{image.width}x{image.height} pixels"
    if shorter == 0:
        raise RejectedImage(faults.CORRUPT, size)
    if shorter < settings.min_size:
        raise RejectedImage(faults.TOO_SMALL, f"{size}, --min_size {settings.min_size}")
    if settings.max_aspect_ratio and longer > settings.max_aspect_ratio * shorter:
        raise RejectedImage(faults.BAD_ASPECT, f"{size}, --max_aspect_ratio {settings.max_aspect_ratio:g}")
    # The other images of an MPO, which many cameras write as .jpg, are previews and depth maps.
    if settings.animated == "reject" and image.format != "MPO" and getattr(image, "is_animated", False):
        raise RejectedImage(faults.ANIMATED, f"{size}, several frames or pages")


# What files that are not read as images begin with: offset, mark, fault, what it is and how to continue.
KNOWN_MARKS = (
    (0, b"version https://git-lfs", "git_lfs_pointer", "a git-lfs pointer, not the file itself: run `git lfs pull`"),
    *(
        (4, b"ftyp" + brand, "heic", "a HEIC image: convert it to JPEG or PNG, for example with ImageMagick")
        for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
    ),
    (4, b"ftypcrx", "camera_raw", "a camera raw file: develop it to TIFF or PNG first"),
    (4, b"ftyp", "video", "a video: extract its frames as images first"),
    (0, b"8BPS", "photoshop", "a Photoshop file: export it as PNG or TIFF"),
    (0, b"%PDF", "pdf", "a PDF: export its pages as images"),
    (0, b"<svg", "svg", "an SVG drawing: render it to PNG"),
    (0, b"<?xml", "svg", "an XML file, perhaps an SVG drawing: render it to PNG"),
    (0, b"<!DOCTYPE html", "web_page", "a web page instead of an image: download the image again"),
    (0, b"<html", "web_page", "a web page instead of an image: download the image again"),
    (0, b"\x00\x00\x01\x00", "icon", "a Windows icon: export it as PNG"),
)
HEAD_BYTES = 64


def _unidentified(image: bytes | str | Path) -> RejectedImage:
    """Return the fault of a file that Pillow cannot identify."""
    if isinstance(image, bytes):
        head = image[:HEAD_BYTES]
    else:
        with open(image, "rb") as file:
            head = file.read(HEAD_BYTES)
    for offset, mark, fault, message in KNOWN_MARKS:
        if head[offset:].lower().startswith(mark.lower()):
            return RejectedImage(fault, message)
    return RejectedImage(faults.NOT_AN_IMAGE, "Pillow knows no image format that starts like this")


def rejection(image: bytes | str | Path | np.ndarray, error: Exception) -> RejectedImage:
    """Return the fault of a file for which Pillow raised `error`."""
    message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        pixels = re.search(r"[0-9]+", message)
        found = f"{int(pixels[0]):,} pixels" if pixels else message
        return RejectedImage(faults.TOO_LARGE, f"{found}; --max_image_pixels is {Image.MAX_IMAGE_PIXELS or 0:,}")
    if isinstance(error, MemoryError):
        return RejectedImage(faults.TOO_LARGE, "decoding it takes more memory than its size says")
    if isinstance(error, FileNotFoundError):
        return RejectedImage(faults.MISSING, "the file does not exist")
    if isinstance(error, (PermissionError, IsADirectoryError)) or getattr(error, "errno", None):
        return RejectedImage(faults.UNREADABLE, getattr(error, "strerror", None) or message)
    size = Path(image).stat().st_size if isinstance(image, str | Path) else len(image)
    if size == 0:
        return RejectedImage(faults.EMPTY, "the file has no bytes")
    if isinstance(error, Image.UnidentifiedImageError) and not isinstance(image, np.ndarray):
        return _unidentified(image)
    if isinstance(error, (OSError, EOFError)) and "truncated" in message.lower() or isinstance(error, EOFError):
        return RejectedImage(faults.TRUNCATED, message)
    return RejectedImage(faults.CORRUPT, message)
