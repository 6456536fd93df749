"""How an image is stored in a prepared dataset: as plain pixels, or encoded as PNG, JPEG or WebP."""

# H/W height and width, C channels, pixels in HWC order

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
from PIL import Image

from trainkit.data.images.corrections import both_bytes, raw_mode_of
from trainkit.data.settings import PreparationSettings

PNG_COLOR_TYPES = {1: 0, 3: 2, 4: 6}  # by channels
PNG_UP_FILTER = 2


def image_features(settings: PreparationSettings) -> dict[str, dict]:
    """Return the columns of an image as `datasets` writes features; not by `datasets`, whose import takes a second."""
    pixel = {"dtype": settings.dtype.name, "_type": "Value"}
    features: dict[str, dict]
    if settings.storage != "pixels":
        features = {"image": {"_type": "Image"}}
    elif settings.fixed_size:
        features = {"image": {"feature": pixel, "length": _image_length(settings), "_type": "List"}}
    else:
        features = {"image": {"feature": pixel, "_type": "List"}}
    side = {"dtype": "int32", "_type": "Value"}
    return features if settings.fixed_size else features | {"height": side, "width": side}


def image_types(settings: PreparationSettings) -> dict[str, pa.DataType]:
    """Return the Arrow types of `image_features`."""
    if settings.storage != "pixels":
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    else:
        length = _image_length(settings) if settings.fixed_size else -1
        image = pa.list_(pa.from_numpy_dtype(settings.dtype), length)
    return {"image": image} if settings.fixed_size else {"image": image, "height": pa.int32(), "width": pa.int32()}


def image_columns(images: list[np.ndarray], settings: PreparationSettings) -> dict[str, pa.Array]:
    """Return the columns that hold `images`, each (H, W, C)."""
    types = image_types(settings)
    if settings.storage != "pixels":
        encoded = pa.array([encode(image, settings) for image in images], pa.binary())
        columns = {
            "image": pa.StructArray.from_arrays([encoded, pa.nulls(len(images), pa.string())], names=["bytes", "path"])
        }
    else:
        pixels = pa.array(np.concatenate([image.reshape(-1) for image in images]))
        if settings.fixed_size:
            return {"image": pa.FixedSizeListArray.from_arrays(pixels, images[0].size)}
        offsets = np.cumsum([0] + [image.size for image in images], dtype=np.int64).astype(np.int32)
        columns = {"image": pa.ListArray.from_arrays(pa.array(offsets), pixels)}
    if not settings.fixed_size:
        columns["height"] = pa.array([image.shape[0] for image in images], types["height"])
        columns["width"] = pa.array([image.shape[1] for image in images], types["width"])
    return columns


def encode(image: np.ndarray, settings: PreparationSettings) -> bytes:
    """Return the bytes of a file that holds `image` (H, W, C)."""
    if settings.bit_depth == 16:
        return _png_16_bit(image)
    file = io.BytesIO()
    picture = Image.fromarray(image[..., 0] if settings.channels == 1 else image)
    quality = settings.storage_quality
    if settings.storage == "png":
        picture.save(file, "PNG")
    elif settings.storage == "jpeg":
        # Halved chroma is visible in images this small; a low quality is requested for small files.
        picture.save(file, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    else:
        picture.save(file, "WEBP", quality=quality, lossless=quality == 100, exact=True)
    return file.getvalue()


def decode(content: bytes, settings: PreparationSettings) -> np.ndarray:
    """Return the image (H, W, C) that `encode` was given, up to its losses. Other threads run while Pillow decodes."""
    with Image.open(io.BytesIO(content), formats=[settings.storage.upper()]) as image:
        if settings.bit_depth == 16 and settings.channels > 1:
            raw_mode = raw_mode_of(image)
            assert raw_mode is not None  # of a PNG
            return both_bytes(raw_mode, lambda: Image.open(io.BytesIO(content)))
        image.load()
        picture: Image.Image = image
        if settings.bit_depth == 8 and image.mode != settings.image_mode:  # WebP has neither grey nor opaque RGBA
            picture = image.convert(settings.image_mode)
        pixels = np.asarray(picture, dtype=settings.dtype)
    return pixels.reshape(*pixels.shape[:2], settings.channels)


def _image_length(settings: PreparationSettings) -> int:
    return settings.height * settings.width * settings.channels


def _png_16_bit(image: np.ndarray) -> bytes:
    """Encode (H, W, C) uint16 as PNG (ISO/IEC 15948, Up filter): Pillow writes 16 bits in grey only."""
    height, width, channels = image.shape
    rows = np.frombuffer(image.astype(">u2").tobytes(), dtype=np.uint8).reshape(height, -1)
    filtered = rows.copy()
    filtered[1:] -= rows[:-1]
    lines = np.concatenate([np.full((height, 1), PNG_UP_FILTER, dtype=np.uint8), filtered], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOR_TYPES[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, content) for kind, content in chunks)


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
