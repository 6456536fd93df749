"""A matrix of modes, bit depths, photometric interpretations, layouts and orientations against what the files mean.

The expected samples are the arrays that the files are made of. tifffile writes the TIFF files and reads them back, and
the PNG and PNM files are written here, so that neither side of a comparison is Pillow's.
"""

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, UnidentifiedImageError

from trainkit.data.faults import RejectedImage
from trainkit.data.images.decode import decode_image
from trainkit.data.settings import PreparationSettings

HEIGHT, WIDTH = 12, 20
SETTINGS = PreparationSettings(HEIGHT, WIDTH, resize_mode="crop")
ROUNDING, ALPHA_ROUNDING = 1.01 / 255, 1.6 / 255  # 16-bit colour is cut to 8 bits, and so is its alpha
y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
COLOR = np.stack([x / (WIDTH - 1), y / (HEIGHT - 1), (x + y) / (HEIGHT + WIDTH - 2)], axis=2)  # (H, W, 3) in [0, 1]
GREY = COLOR[..., :1]
ALPHA = 1 - COLOR[..., 1:2] / 2
ORIENTED = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}


def assert_decodes(file: bytes, expected: np.ndarray, tolerance: float = ROUNDING, deep_tolerance: float = ROUNDING):
    """At 8 and at 16 bits; `expected` (H, W, 1 or 3) is in [0, 1]. What Pillow cannot open is rejected."""
    try:
        Image.open(io.BytesIO(file)).close()
    except UnidentifiedImageError:
        with pytest.raises(RejectedImage):
            decode_image(file, SETTINGS)
        return
    height, width = expected.shape[:2]
    for bit_depth, allowed in ((8, tolerance), (16, deep_tolerance)):
        settings = dataclasses.replace(SETTINGS, height=height, width=width, bit_depth=bit_depth)
        decoded = decode_image(file, settings) / (2**bit_depth - 1)
        assert np.abs(decoded - expected).max() <= allowed, f"{bit_depth} bits"


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return color * alpha + 1 - alpha


def sampled(unit: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Samples of a type for values in [0, 1], and the values that they stand for."""
    full = 1 if dtype.startswith("float") else np.iinfo(dtype).max
    samples = np.rint(unit * full).astype(dtype) if full > 1 else unit.astype(dtype)
    return samples, samples / full


def tiff(samples: np.ndarray, planar: bool = False, **options) -> bytes:
    """A TIFF of (H, W, C) samples, which tifffile also reads back."""
    if planar:
        samples, options = np.moveaxis(samples, -1, 0), options | {"planarconfig": "separate"}
    elif samples.shape[2] == 1:
        samples = samples[..., 0]
    else:
        options["planarconfig"] = "contig"
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    if options.get("compression") is None:
        assert np.array_equal(tifffile.imread(io.BytesIO(file.getvalue())), samples)
    return file.getvalue()


@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32"])
def test_grey_tiff(dtype, photometric, byteorder):
    samples, values = sampled(GREY, dtype)
    file = tiff(samples, photometric=photometric, byteorder=byteorder)
    exact = 0.51 / 65535 + 1e-7 if dtype not in ("uint8", "int8") else 1 / 65535
    assert_decodes(file, values if photometric == "minisblack" else 1 - values, deep_tolerance=exact)


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_zero_is_grey_where_a_tiff_has_negative_samples(dtype):
    samples, values = sampled(2 * GREY - 1, dtype)
    assert_decodes(tiff(samples, photometric="minisblack"), (values + 1) / 2)


@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("extra", [None, "unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_colour_tiff(dtype, planar, extra, byteorder):
    unit = COLOR * ALPHA if extra == "assocalpha" else COLOR
    samples, values = sampled(unit if extra is None else np.concatenate([unit, ALPHA], axis=2), dtype)
    options = {"photometric": "rgb", "byteorder": byteorder} | ({"extrasamples": [extra]} if extra else {})
    file = tiff(samples, planar, **options)
    expected, alpha = values[..., :3], values[..., 3:]
    if extra == "unassalpha":
        expected = over_white(expected, alpha)
    elif extra == "assocalpha":
        expected = expected + 1 - alpha
    has_alpha = extra in ("unassalpha", "assocalpha")
    exact = 1.01 / 65535 if dtype == "uint16" else ALPHA_ROUNDING
    assert_decodes(file, expected, ALPHA_ROUNDING if has_alpha else ROUNDING, 2 * exact if has_alpha else exact)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_cmyk_tiff(dtype, planar):
    samples, inks = sampled(np.concatenate([COLOR, GREY * 0.3], axis=2), dtype)
    assert_decodes(
        tiff(samples, planar, photometric="separated"), (1 - inks[..., :3]) * (1 - inks[..., 3:]), 0.006, 0.006
    )


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("layout", [{}, {"tile": (16, 16)}, {"rowsperstrip": 5}], ids=["strip", "tiles", "strips"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(
    ("photometric", "planar"), [("minisblack", False), ("miniswhite", False), ("rgb", False), ("rgb", True)]
)
def test_layouts_of_a_tiff(photometric, planar, dtype, layout, bigtiff):
    samples, values = sampled(COLOR if photometric == "rgb" else GREY, dtype)
    file = tiff(samples, planar, photometric=photometric, bigtiff=bigtiff, **layout)
    exact = 1.01 / 65535
    assert_decodes(file, 1 - values if photometric == "miniswhite" else values, deep_tolerance=exact)


@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_compressed_tiff(dtype, planar, predictor):
    """Deflate, which tifffile writes by itself, through libtiff."""
    samples, values = sampled(COLOR, dtype)
    file = tiff(samples, planar, photometric="rgb", compression="zlib", predictor=predictor)
    assert_decodes(file, values, deep_tolerance=1.01 / 65535)


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(
    ("photometric", "planar"), [("minisblack", False), ("miniswhite", False), ("rgb", False), ("rgb", True)]
)
def test_oriented_tiff(photometric, planar, dtype, orientation):
    samples, values = sampled(COLOR if photometric == "rgb" else GREY, dtype)
    file = tiff(samples, planar, photometric=photometric, extratags=[(274, 3, 1, orientation, True)])
    values = 1 - values if photometric == "miniswhite" else values
    assert_decodes(file, ORIENTED[orientation](values), deep_tolerance=1.01 / 65535)


def test_palette_tiff():
    palette = np.stack([np.arange(256) * 257, np.arange(256)[::-1] * 257, np.full(256, 30000)]).astype(np.uint16)
    samples, _ = sampled(GREY, "uint8")
    assert_decodes(tiff(samples, photometric="palette", colormap=palette), palette.T[samples[..., 0]] / 65535)


def png(samples: np.ndarray, bits: int, color_type: int, palette: bytes = b"", transparency: bytes = b"") -> bytes:
    """ISO/IEC 15948, without filters, of integers (H, W, C)."""
    rows = samples.reshape(samples.shape[0], -1).astype(">u2" if bits == 16 else np.uint8)
    if bits < 8:
        rows = np.packbits(((rows[..., None] >> np.arange(bits)[::-1]) & 1).reshape(len(rows), -1), axis=1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [(b"IHDR", header), (b"PLTE", palette), (b"tRNS", transparency), (b"IDAT", data)]
    parts = [chunk(kind, content) for kind, content in chunks if content]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_png_and_its_transparent_grey(bits):
    samples = np.rint(GREY * (2**bits - 1)).astype(int)
    assert_decodes(png(samples, bits, 0), samples / (2**bits - 1), deep_tolerance=1.01 / 65535)
    marked = int(samples[3, 7, 0])
    expected = np.where(samples == marked, 1, samples / (2**bits - 1))
    assert_decodes(png(samples, bits, 0, transparency=struct.pack(">H", marked)), expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_png_and_its_alpha(bits):
    indices, full = np.rint(GREY * (2**bits - 1)).astype(int)[..., 0], 2**bits - 1
    ramp = np.arange(full + 1) * 255 // full
    palette = np.stack([ramp, 255 - ramp, np.full(full + 1, 77)], axis=1).astype(np.uint8)
    color, alpha = palette[indices] / 255, ramp[::-1][indices][..., None] / 255
    assert_decodes(png(indices[..., None], bits, 3, palette.tobytes()), color)
    file = png(indices[..., None], bits, 3, palette.tobytes(), ramp[::-1].astype(np.uint8).tobytes())
    assert_decodes(file, over_white(color, alpha), ALPHA_ROUNDING, ALPHA_ROUNDING)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_colour_png_its_alpha_and_its_transparent_colour(dtype):
    bits = np.iinfo(dtype).bits
    samples, values = sampled(np.concatenate([COLOR, ALPHA], axis=2), dtype)
    color, alpha = values[..., :3], values[..., 3:]
    assert_decodes(png(samples[..., :3], bits, 2), color, deep_tolerance=1.01 / 65535)
    assert_decodes(png(samples, bits, 6), over_white(color, alpha), ALPHA_ROUNDING, ALPHA_ROUNDING)
    expected = over_white(values[..., :1], alpha)
    assert_decodes(png(samples[..., [0, 3]], bits, 4), expected, ALPHA_ROUNDING, ALPHA_ROUNDING)
    marked = samples[3, 7, :3]
    expected = np.where((samples[..., :3] == marked).all(axis=2, keepdims=True), 1, color)
    file = png(samples[..., :3], bits, 2, transparency=struct.pack(">3H", *marked.tolist()))
    assert_decodes(file, expected)
    kept = decode_image(file, dataclasses.replace(SETTINGS, image_mode="RGBA"))
    assert (kept[3, 7, 3], kept[0, 0, 3]) == (0, 255)


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("maximum", [1, 15, 31, 255, 1023, 4095, 65535])
def test_pnm_of_any_maximum(maximum, is_plain):
    for unit, magic in ((GREY, "P2" if is_plain else "P5"), (COLOR, "P3" if is_plain else "P6")):
        samples = np.rint(unit * maximum).astype(int)
        content = samples.astype(">u2" if maximum > 255 else np.uint8).tobytes()
        content = " ".join(map(str, samples.flat)).encode() if is_plain else content
        assert_decodes(f"{magic}\n# a comment\n{WIDTH} {HEIGHT}\n{maximum}\n".encode() + content, samples / maximum)


@pytest.mark.parametrize("byteorder", "<>")
def test_grey_pfm(byteorder):
    samples = GREY.astype(f"{byteorder}f4")
    header = f"Pf\n{WIDTH} {HEIGHT}\n{-1 if byteorder == '<' else 1}\n".encode()
    assert_decodes(header + samples[::-1].tobytes(), samples)


@pytest.mark.parametrize(
    ("format", "mode", "options", "tolerance"),
    [
        *((format, mode, {}, 0) for format in ("BMP", "TGA", "PPM") for mode in ("L", "RGB")),
        *((format, "RGBA", {}, 0) for format in ("TGA", "JPEG2000")),
        *(("WEBP", mode, {"lossless": True}, 0) for mode in ("RGB", "RGBA")),
        *(("JPEG2000", mode, {}, 0) for mode in ("L", "LA", "RGB")),
        *(("JPEG", mode, {"quality": 100, "subsampling": 0}, 3) for mode in ("L", "RGB", "CMYK")),
    ],
)
def test_formats_that_pillow_writes(format, mode, options, tolerance):
    samples = np.rint(np.concatenate([COLOR, ALPHA], axis=2) * 255).astype(np.uint8)
    image = Image.fromarray(samples).convert(mode)
    values = np.asarray(image.convert("RGBA")) / 255
    file = io.BytesIO()
    image.save(file, format, **options)
    allowed = ROUNDING + tolerance / 255 + (ALPHA_ROUNDING if "A" in mode else 0)
    assert_decodes(file.getvalue(), over_white(values[..., :3], values[..., 3:]), allowed, allowed)


def test_jpeg2000_that_pillow_would_turn_from_white_to_black_is_rejected():
    file = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(file, "JPEG2000")
    eight_bits = file.getvalue()
    start = eight_bits.index(b"\xff\x4f\xff\x51") + 4 + 38
    sixteen_bits = eight_bits[:start] + b"\x0f\x01\x01" * 3 + eight_bits[start + 9 :]
    assert decode_image(eight_bits, SETTINGS).min() == 255
    with pytest.raises(RejectedImage, match="JPEG 2000 in colour with 16 bits per channel: convert") as rejected:
        decode_image(sixteen_bits, SETTINGS)
    assert rejected.value.fault == "unsupported"
