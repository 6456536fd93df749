"""Image file -> pixels of the target size, the same whatever the file's format, colour mode and orientation.

Plain Pillow and numpy, no torch: worker processes import this and must start fast.
"""

# H/W target height and width, C channels, pixels in HWC order

import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

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

ImageFile.LOAD_TRUNCATED_IMAGES = False  # half a picture is a fault, not a picture

# Only picture formats: Pillow would also open PostScript (it runs Ghostscript) whatever the file's name says.
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
FORMATS = [plugin.format for plugin in PLUGINS if plugin.format in Image.OPEN]

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # one channel of more than 8 bits
ORIENTATION_TAG, BITS_PER_SAMPLE_TAG = 0x0112, 0x0102
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A 16-bit colour image: Pillow's unpackers keep one byte of each sample, this one or the other.
OTHER_BYTE = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGB;16N": "RGB;16B",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16L": "RGBA;16B",
    "RGBA;16N": "RGBA;16B",
}


@dataclass(frozen=True)
class PreparationSettings:
    """What is made of an image: all that decides the stored pixels besides the file itself."""

    height: int
    width: int
    center_crop: bool = False
    image_mode: str = "RGB"  # L, RGB or RGBA
    background: tuple[int, int, int] = (255, 255, 255)  # behind transparent pixels, in L and RGB
    bit_depth: int = 8  # 8 or 16

    @property
    def channels(self) -> int:
        return CHANNELS[self.image_mode]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.bit_depth == 8 else np.uint16)


class RejectedImage(Exception):
    """A file that is not taken: `fault` is its class (truncated, not_an_image, ...), the message says more."""

    def __init__(self, fault: str, message: str):
        super().__init__(message)
        self.fault = fault


def decode_image(image: bytes | str | Path | np.ndarray, settings: PreparationSettings) -> np.ndarray:
    """Decode the (first frame of the) image in a file, or in the bytes of one, at its target size.

    An image may also be an array (height, width, 1 to 4 channels) of uint8, uint16 or floats in [0, 1].

    Returns (H, W, C) with `settings.center_crop`; without it the image's own aspect is kept and (H, W) is covered.
    uint8, or uint16 at `bit_depth` 16 (8-bit samples times 257). Raises `RejectedImage`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with _open(image) as opened:
                if settings.bit_depth == 16:
                    return _decode_deep(opened, image, settings)
                return _decode(opened, settings)
        except RejectedImage:
            raise
        except Exception as error:  # Pillow's plugins raise almost anything on a broken file
            raise _rejection(image, error) from None


def _open(image: bytes | str | Path | np.ndarray) -> Image.Image:
    if isinstance(image, np.ndarray):
        pixels = image if image.dtype == np.uint8 else np.rint(_unit_array(image) * 255).astype(np.uint8)
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS)


def _rejection(image: bytes | str | Path, error: Exception) -> RejectedImage:
    message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError, MemoryError)):
        return RejectedImage("too_large", message)
    if isinstance(error, FileNotFoundError):
        return RejectedImage("missing", "the file is not there")
    if isinstance(error, (PermissionError, IsADirectoryError)) or getattr(error, "errno", None):
        return RejectedImage("unreadable", error.strerror or message)
    size = Path(image).stat().st_size if isinstance(image, str | Path) else len(image)
    if size == 0:
        return RejectedImage("empty", "the file has no bytes")
    if isinstance(error, Image.UnidentifiedImageError):
        return RejectedImage("not_an_image", "Pillow knows no image format that starts like this")
    if isinstance(error, (OSError, EOFError)) and "truncated" in message.lower() or isinstance(error, EOFError):
        return RejectedImage("truncated", message)
    return RejectedImage("corrupt", message)


def _unit_array(array: np.ndarray) -> np.ndarray:
    """An array's samples in [0, 1], float32."""
    full = np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1
    return array.astype(np.float32) / np.float32(full)


def covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest (width, height) of the same aspect as `size` that covers `target`, as torchvision rounds it."""
    (width, height), (target_width, target_height) = size, target
    if target_width * height >= target_height * width:
        return target_width, height * target_width // width
    return width * target_height // height, target_height


def _decode(image: Image.Image, settings: PreparationSettings) -> np.ndarray:
    """8 bits a channel, in Pillow throughout."""
    target = (settings.width, settings.height)
    orientation = None
    if image.format in ("JPEG", "MPO"):
        # The decoder itself can shrink by 2, 4 or 8; twice the size is left to the antialiased resize.
        orientation = _orientation(image)
        width, height = _resized_size(image.size, target, orientation)
        image.draft("L" if settings.image_mode == "L" else None, (2 * width, 2 * height))
        resized_size = width, height
        image.load()
    else:
        image.load()
        orientation = _orientation(image)  # PNG may hold it behind the pixels; TIFF has applied it by now
        resized_size = _resized_size(image.size, target, orientation)
    image = _standard_mode(image, settings.image_mode)
    if image.size != resized_size:
        image = image.resize(resized_size, Image.Resampling.BILINEAR, reducing_gap=3.0)
    if orientation in TRANSPOSES:
        image = image.transpose(TRANSPOSES[orientation])
    if settings.center_crop:
        image = image.crop(_center_box(image.size, target))
    if image.mode == "RGBA" and settings.image_mode != "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*settings.background, 255)), image)
    if image.mode != settings.image_mode:
        image = image.convert(settings.image_mode)
    return np.asarray(image).reshape(image.height, image.width, settings.channels)


def _standard_mode(image: Image.Image, image_mode: str) -> Image.Image:
    """L, RGB, or RGBA where there is transparency (also that of a palette or of one marked colour)."""
    if image.mode in DEEP_MODES:
        return Image.fromarray(np.rint(_unit_samples(image) * 255).astype(np.uint8))
    if image.mode == "RGBA" or image.has_transparency_data:
        return image if image.mode == "RGBA" else image.convert("RGBA")
    if image.mode == "L":
        return image
    mode = "L" if image_mode == "L" or image.mode == "1" else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _unit_samples(image: Image.Image) -> np.ndarray:
    """The samples (H, W) of one deep channel, scaled to [0, 1] in float32: by its range, never by clipping it."""
    samples = np.nan_to_num(np.asarray(image).astype(np.float32))
    top = float(samples.max(initial=0.0))
    if image.mode == "F":  # no range of its own: the smallest usual one that holds the samples
        full = next((full for full in (1.0, 255.0, 65535.0) if top <= full), top)
    elif image.format == "TIFF" and image.mode != "I":
        full = 2.0 ** image.tag_v2.get(BITS_PER_SAMPLE_TAG, (16,))[0] - 1
    else:
        full = 65535.0 if top <= 65535.0 else 2.0**31 - 1
    return np.clip(samples / full, 0.0, 1.0)


def _decode_deep(image: Image.Image, source: bytes | str | Path, settings: PreparationSettings) -> np.ndarray:
    """16 bits a channel, in float32: Pillow has no 16-bit colour mode."""
    tile_args = image.tile[0][3] if len(getattr(image, "tile", ())) == 1 else None
    image.load()
    orientation = _orientation(image)
    samples = _deep_samples(image, tile_args, source)  # (H, W, 1, 3 or 4) in [0, 1]
    target = (settings.width, settings.height)
    has_alpha = samples.shape[2] == 4
    if has_alpha:
        samples[..., :3] *= samples[..., 3:]
    resized_size = _resized_size(image.size, target, orientation)
    planes = [Image.fromarray(np.ascontiguousarray(samples[..., channel])) for channel in range(samples.shape[2])]
    planes = [plane.resize(resized_size, Image.Resampling.BILINEAR, reducing_gap=3.0) for plane in planes]
    if orientation in TRANSPOSES:
        planes = [plane.transpose(TRANSPOSES[orientation]) for plane in planes]
    if settings.center_crop:
        planes = [plane.crop(_center_box(plane.size, target)) for plane in planes]
    samples = np.stack([np.asarray(plane) for plane in planes], axis=2)
    if has_alpha:
        color, alpha = samples[..., :3], samples[..., 3:]
        if settings.image_mode == "RGBA":
            samples = np.concatenate([color / np.maximum(alpha, 1e-6), alpha], axis=2)
        else:
            samples = color + (1 - alpha) * (np.array(settings.background, dtype=np.float32) / 255)
    samples = _to_channels(samples, settings.image_mode)
    return np.rint(np.clip(samples, 0, 1) * 65535).astype(np.uint16)


def _deep_samples(image: Image.Image, tile_args, source: bytes | str | Path) -> np.ndarray:
    """The samples (H, W, C) of a loaded image in [0, 1], at the file's precision where Pillow can reach it.

    Pillow reads 16-bit grey whole, but of 16-bit colour only the high bytes; the low ones are had by reading it
    a second time with the other byte order.
    """
    if isinstance(source, np.ndarray):
        return _unit_array(source)
    if image.mode in DEEP_MODES:
        return _unit_samples(image)[..., None]
    raw_mode = tile_args[0] if isinstance(tile_args, tuple) else tile_args
    other = OTHER_BYTE.get(raw_mode)
    if other is not None:
        with _open(source) as second:
            args = (other, *tile_args[1:]) if isinstance(tile_args, tuple) else other
            second.tile = [second.tile[0]._replace(args=args)]
            second.load()
            low = np.asarray(second)
        return (np.asarray(image) * np.float32(256) + low) / np.float32(65535)
    standard = _standard_mode(image, "RGB")
    samples = np.asarray(standard).reshape(image.height, image.width, -1)
    return samples / np.float32(255)


def _to_channels(samples: np.ndarray, image_mode: str) -> np.ndarray:
    channels = samples.shape[2]
    if image_mode == "L":
        weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as Pillow's convert("L")
        return samples if channels == 1 else (samples[..., :3] @ weights)[..., None]
    color = np.repeat(samples, 3, axis=2) if channels == 1 else samples
    if image_mode == "RGBA" and color.shape[2] == 3:
        return np.concatenate([color, np.ones_like(color[..., :1])], axis=2)
    return color


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none or where the EXIF block is broken: the pixels are not."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # whatever a malformed block makes Pillow raise
        return 1


def _resized_size(size: tuple[int, int], target: tuple[int, int], orientation: int) -> tuple[int, int]:
    """The covering size in the stored frame: for orientations 5 to 8 that frame lies on its side."""
    if orientation in (5, 6, 7, 8):
        width, height = covering_size(size[::-1], target)
        resized = height, width
    else:
        resized = covering_size(size, target)
    if resized[0] * resized[1] > (Image.MAX_IMAGE_PIXELS or math.inf):  # None where someone switched the limit off
        raise RejectedImage("too_large", f"{size[0]}x{size[1]} would become {resized[0]}x{resized[1]} pixels")
    return resized


def _center_box(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """Where torchvision's CenterCrop cuts."""
    left, top = round((size[0] - target[0]) / 2), round((size[1] - target[1]) / 2)
    return left, top, left + target[0], top + target[1]
