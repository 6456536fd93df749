"""Images that Pillow opens but reads differently from what their format says.

`tests/data/test_pixel_matrix.py` compares a matrix of formats with their exact samples.
"""

# H/W height and width, C channels, samples in HWC order

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFile, Jpeg2KImagePlugin, TiffImagePlugin

from trainkit.data import faults
from trainkit.data.faults import RejectedImage
from trainkit.data.images.colour import DEEP_MODES, unit_samples

PHOTOMETRIC, PLANAR, SAMPLE_FORMAT, BITS, EXTRA_SAMPLES, SAMPLES_PER_PIXEL = 262, 284, 339, 258, 338, 277
TILE_OFFSETS = 324
PLANE_TAGS = (273, 279, TILE_OFFSETS, 325)  # offsets and byte counts of strips and of tiles
WHITE_IS_ZERO, SEPARATE, PREMULTIPLIED, UNSIGNED, SIGNED = 0, 2, 1, 1, 2
JPEG2000_HEAD_BYTES = 2**16
SIZ_MARK = b"\xff\x4f\xff\x51"  # ISO/IEC 15444-1, A.5.1
OTHER_BYTE = {"L": "B", "B": "L", "N": "B"}  # of the suffixes of Pillow's 16-bit raw modes


def check_readable(image: Image.Image) -> None:
    """Raise `RejectedImage` for an image whose samples Pillow cannot give: JPEG 2000 in colour above 8 bits.

    Pillow rounds its samples to 8 bits with an overflow that turns white into black.
    """
    if not isinstance(image, Jpeg2KImagePlugin.Jpeg2KImageFile) or image.mode not in ("LA", "RGB", "RGBA"):
        return
    assert image.fp is not None, "it is not decoded yet"
    position = image.fp.tell()
    image.fp.seek(0)
    head = image.fp.read(JPEG2000_HEAD_BYTES)
    image.fp.seek(position)
    _, found, sizes = head.partition(SIZ_MARK)
    bits = [(sizes[38 + 3 * channel] & 0x7F) + 1 for channel in range(len(image.getbands()))] if found else [8]
    if max(bits) > 8:
        raise RejectedImage(
            faults.UNSUPPORTED, f"JPEG 2000 in colour with {max(bits)} bits per channel: convert it to PNG or TIFF"
        )


def load_corrected(image: Image.Image, open_again: Callable[[], Image.Image]) -> tuple[Image.Image, np.ndarray | None]:
    """Decode an opened image; `open_again` opens it a second time.

    Returns the image, or one with the right samples instead, and the 16-bit colour samples (H, W, C) uint16 if
    those had to be read another way. C is 3 or 4, with straight alpha; None for all other images.
    """
    deep = _deep_colour(image, open_again)
    raw_mode = raw_mode_of(image)
    if deep is None or image.format != "TIFF":  # Pillow cannot decode some of those
        image.load()
    if deep is not None:
        samples, mode = deep
        corrected = Image.fromarray(np.rint(samples / 257).astype(np.uint8), mode)
        names = ("icc_profile",) if image.format == "TIFF" else ("icc_profile", "exif")  # a plane is upright already
        corrected.info = {name: image.info[name] for name in names if name in image.info}
        return corrected, None if mode == "CMYK" else samples
    if image.format == "PNG" and raw_mode in ("L;2", "L;4") and "transparency" in image.info:
        image.info["transparency"] *= 255 // (2 ** int(raw_mode[2:]) - 1)  # Pillow scales the samples alone
    return (_deep_grey(image) if isinstance(image, TiffImagePlugin.TiffImageFile) else image), None


def raw_mode_of(image: Image.Image) -> str | None:
    """The layout of an opened image's samples in Pillow's terms; None if it is not the same throughout the file."""
    arguments = [tile[3] for tile in getattr(image, "tile", ())]
    raw_modes = {argument[0] if isinstance(argument, tuple) and argument else argument for argument in arguments}
    raw_mode = raw_modes.pop() if len(raw_modes) == 1 else None
    return raw_mode if isinstance(raw_mode, str) else None


def read_as(image: Image.Image, raw_mode: str) -> np.ndarray:
    """The samples of an opened image, decoded as if they had the layout `raw_mode`."""
    assert isinstance(image, ImageFile.ImageFile)
    image.tile = [
        tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode)
        for tile in image.tile
    ]
    image.load()
    return np.asarray(image)


def both_bytes(raw_mode: str, open_again: Callable[[], Image.Image]) -> np.ndarray:
    """The samples (H, W, C) uint16 of a 16-bit colour image.

    Pillow keeps one byte of each sample: the high one, or with the opposite byte order the low one.
    """
    other = raw_mode[:-1] + OTHER_BYTE[raw_mode[-1]]
    with open_again() as first, open_again() as second:
        return read_as(first, raw_mode).astype(np.uint16) << 8 | read_as(second, other)


def _deep_colour(image: Image.Image, open_again: Callable[[], Image.Image]) -> tuple[np.ndarray, str] | None:
    """Samples (H, W, C) uint16 and the mode (RGB, RGBA, CMYK) of colour that Pillow misreads."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and _has_misread_planes(image.tag_v2):
        assert image.fp is not None, "it is not decoded yet"
        position = image.fp.tell()
        image.fp.seek(0)
        content = image.fp.read()
        image.fp.seek(position)
        planes = [_plane(content, image.tag_v2, number) for number in range(len(image.getbands()))]
        samples = np.stack(planes, axis=2)
        samples = samples * np.uint16(257) if samples.dtype == np.uint8 else samples
        is_premultiplied = image.mode == "RGBA" and image.tag_v2.get(EXTRA_SAMPLES, (0,))[0] == PREMULTIPLIED
        return _straight(samples) if is_premultiplied else samples, image.mode
    raw_mode = raw_mode_of(image) or ""
    if raw_mode.startswith("RGBa;16"):
        return _straight(both_bytes(raw_mode.replace("a", "A"), open_again)), "RGBA"
    marked = image.info.get("transparency")
    if image.format == "PNG" and raw_mode == "RGB;16B" and isinstance(marked, tuple):
        samples = both_bytes(raw_mode, open_again)
        alpha = np.where((samples == np.array(marked)).all(axis=2, keepdims=True), 0, 65535).astype(np.uint16)
        return np.concatenate([samples, alpha], axis=2), "RGBA"
    return None


def _straight(samples: np.ndarray) -> np.ndarray:
    """RGBA samples (H, W, 4) uint16 whose colour was multiplied by alpha, without that."""
    color, alpha = samples[..., :3].astype(np.float64), samples[..., 3:]
    color = np.minimum(np.rint(color * 65535 / np.maximum(alpha, 1)), 65535)
    return np.concatenate([color.astype(np.uint16), alpha], axis=2)


def _has_misread_planes(tags: TiffImagePlugin.ImageFileDirectory_v2) -> bool:
    """Whether channels are stored one after the other with 16 bits, or with premultiplied alpha."""
    bits, extra = set(tags.get(BITS, ())), tags.get(EXTRA_SAMPLES, (0,))[0]
    return (
        tags.get(PLANAR) == SEPARATE
        and tags.get(SAMPLES_PER_PIXEL, 1) > 1
        and (bits == {16} or bits == {8} and extra == PREMULTIPLIED)
    )


def _plane(content: bytes, tags: TiffImagePlugin.ImageFileDirectory_v2, number: int) -> np.ndarray:
    """Plane `number` (H, W) of the TIFF `content`, read by means of a directory that describes it as a grey image."""
    directory = TiffImagePlugin.ImageFileDirectory_v2(content[: 16 if 43 in content[2:4] else 8])
    for tag, value in tags.items():
        directory.tagtype[tag] = tags.tagtype[tag]
        if tag in PLANE_TAGS:
            strips = len(value) // tags[SAMPLES_PER_PIXEL]
            value = value[number * strips : (number + 1) * strips]
        directory[tag] = value
    directory[BITS], directory[SAMPLES_PER_PIXEL] = tags[BITS][number], 1
    directory[PHOTOMETRIC], directory[PLANAR], directory[SAMPLE_FORMAT] = 1, 1, UNSIGNED
    if EXTRA_SAMPLES in directory:
        del directory[EXTRA_SAMPLES]
    file = io.BytesIO()
    directory.save(file)
    if TILE_OFFSETS in directory:  # Pillow moves the offsets of strips behind the new directory, but not these
        directory[TILE_OFFSETS] = tuple(offset + file.tell() for offset in directory[TILE_OFFSETS])
        file = io.BytesIO()
        directory.save(file)
    file.write(content)
    with Image.open(file) as plane:
        return np.asarray(plane)


def _deep_grey(image: TiffImagePlugin.TiffImageFile) -> Image.Image:
    """The same TIFF of one channel, or one in mode F if Pillow ignores its sign or that white is zero."""
    tags, grey = image.tag_v2, None
    bits, sample_format = tags.get(BITS, (1,))[0], tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0]
    if sample_format == SIGNED and bits in (8, 16) and image.mode in ("L", "I"):
        samples = np.asarray(image)
        samples = samples.view(np.int8) if bits == 8 else samples
        grey = np.maximum(samples / (2 ** (bits - 1) - 1), -1)
    elif sample_format == UNSIGNED and bits == 32 and image.mode == "I":
        samples = np.asarray(image).view(np.uint32)
        grey = samples / (65535 if samples.max(initial=0) <= 65535 else 2**32 - 1)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO and image.mode in DEEP_MODES:
        grey = 1 - (unit_samples(image) if grey is None else grey)
    return image if grey is None else Image.fromarray(grey.astype(np.float32))
