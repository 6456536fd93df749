"""Decode an image file to pixels of the target size, whatever its format, colour mode and orientation.

This module uses Pillow and numpy without torch: worker processes import it and must start fast.
"""

# H/W target height and width, C channels, pixels in HWC order

import io
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from trainkit.data.faults import RejectedImage
from trainkit.data.images.colour import is_srgb, standard_mode
from trainkit.data.images.corrections import check_readable, load_corrected
from trainkit.data.images.decode_16bit import decode_16bit, unit_array
from trainkit.data.images.geometry import TRANSPOSES, center_box, middle_part, orientation_of, plan_like, shown_size
from trainkit.data.images.limits import check_header, pillow_limits, rejection
from trainkit.data.settings import PreparationSettings

ImageFile.LOAD_TRUNCATED_IMAGES = False  # a truncated image is rejected

# Only raster formats: Pillow would also open PostScript, whatever the file's name, and run Ghostscript.
PLUGINS = [
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    WebPImagePlugin.WebPImageFile,
    GifImagePlugin.GifImageFile,
    BmpImagePlugin.BmpImageFile,
    BmpImagePlugin.DibImageFile,
    PpmImagePlugin.PpmImageFile,
    TiffImagePlugin.TiffImageFile,
    Jpeg2KImagePlugin.Jpeg2KImageFile,
    TgaImagePlugin.TgaImageFile,
]
try:
    from PIL import AvifImagePlugin

    PLUGINS.append(AvifImagePlugin.AvifImageFile)
except ImportError:  # Pillow before 11.3
    pass
TGA_EXTENSIONS, TGA_FOOTER = (".tga", ".icb", ".vda", ".vst"), b"TRUEVISION-XFILE.\x00"
FORMATS = [plugin.format for plugin in PLUGINS if plugin.format in Image.OPEN]


def decode_image(image: bytes | str | Path | np.ndarray, settings: PreparationSettings) -> np.ndarray:
    """Decode an image file, or the bytes of one, at its target size; the first frame if there are several.

    An image may also be an array (height, width, 1, 3 or 4) of uint8, uint16 or floats in [0, 1].

    Returns (H, W, C) uint8, or uint16 at `bit_depth` 16 (8-bit samples times 257). With `resize_mode` random_crop the
    image keeps its aspect ratio and covers (H, W), up to `MAX_ASPECT` such windows. Raises `RejectedImage`.
    """
    return decode_like(image, settings)[0]


def decode_like(
    image: bytes | str | Path | np.ndarray, settings: PreparationSettings, like: tuple[int, int] | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """As `decode_image`, with the size (width, height) in pixels of the image as it is shown.

    `like` is that size of another image of the same shape: this one is then resized and cropped as that one is.
    Raises `RejectedImage`.
    """
    with pillow_limits(settings.max_image_pixels):
        try:
            with open_image(image) as opened:
                check_header(opened, settings)
                check_readable(opened)
                if settings.bit_depth == 16:
                    samples = unit_array(image) if isinstance(image, np.ndarray) else None
                    return decode_16bit(opened, lambda: open_image(image), settings, samples, like)
                return _decode(opened, lambda: open_image(image), settings, like)
        except RejectedImage:
            raise
        except Exception as error:  # Pillow's plugins raise almost anything on a broken file
            raise rejection(image, error) from None


def image_size(image: bytes | str | Path) -> tuple[int, int]:
    """Return height and width in pixels of an image file as it is shown. Raises `RejectedImage`."""
    try:
        with open_image(image) as opened:
            return shown_size(opened.size, orientation_of(opened))[::-1]
    except Exception as error:  # Pillow's plugins raise almost anything on a broken file
        raise rejection(image, error) from None


def open_image(image: bytes | str | Path | np.ndarray) -> Image.Image:
    """Open an image file, the bytes of one, or pixels (H, W, C), without decoding it. Raises what Pillow raises."""
    if isinstance(image, np.ndarray):
        pixels = image if image.dtype == np.uint8 else np.rint(unit_array(image) * 255).astype(np.uint8)
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS)
    if opened.format == "TGA" and opened.fp is not None and not _is_targa(image, opened.fp):
        opened.close()
        raise Image.UnidentifiedImageError
    return opened


def _is_targa(image: bytes | str | Path, file: IO[bytes]) -> bool:
    """Whether a file is a TGA by its name or the mark at its end; others look like it, since none is at its start."""
    if not isinstance(image, bytes) and Path(image).suffix.lower() in TGA_EXTENSIONS:
        return True
    position = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(max(0, end - len(TGA_FOOTER)))
    footer = file.read()
    file.seek(position)
    return footer == TGA_FOOTER


def _decode(
    image: Image.Image,
    open_again: Callable[[], Image.Image],
    settings: PreparationSettings,
    like: tuple[int, int] | None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode to 8 bits per channel, in Pillow throughout."""
    target = (settings.width, settings.height)
    if image.format in ("JPEG", "MPO"):
        # The decoder itself can shrink by 2, 4 or 8. It keeps twice the size, for the antialiased resize.
        orientation = orientation_of(image)
        full_size, part, resized_size = plan_like(image.size, settings, orientation, like)
        wanted = [2 * side * full // kept for side, full, kept in zip(resized_size, full_size, part, strict=True)]
        image.draft("L" if settings.image_mode == "L" and is_srgb(image) else None, (wanted[0], wanted[1]))
        image.load()
    else:
        image, _ = load_corrected(image, open_again)
        # Only now: a PNG may store it after the pixels, and Pillow has applied that of a TIFF.
        orientation = orientation_of(image)
        full_size, part, resized_size = plan_like(image.size, settings, orientation, like)
    image = middle_part(standard_mode(image, settings.image_mode), full_size, part)
    if image.size != resized_size:
        image = image.resize(resized_size, Image.Resampling.BILINEAR, reducing_gap=3.0)
    if orientation in TRANSPOSES:
        image = image.transpose(TRANSPOSES[orientation])
    if settings.resize_mode == "crop":
        image = image.crop(center_box(image.size, target))
    if image.mode == "RGBA" and settings.image_mode != "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*settings.background, 255)), image)
    if image.mode != settings.image_mode:
        image = image.convert(settings.image_mode)
    if settings.resize_mode == "pad" and image.size != target:
        around = Image.new("RGB", (1, 1), settings.background).convert(settings.image_mode).getpixel((0, 0))
        canvas = Image.new(settings.image_mode, target, 0 if settings.image_mode == "RGBA" else around)
        canvas.paste(image, center_box(target, image.size)[:2])
        image = canvas
    return np.asarray(image).reshape(image.height, image.width, settings.channels), shown_size(full_size, orientation)
