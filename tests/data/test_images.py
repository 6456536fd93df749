"""Every kind of image file becomes the right pixels, or is rejected with the right reason."""

import dataclasses
import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from trainkit.data.images.decode import PreparationSettings, RejectedImage, decode_image
from trainkit.data.images.geometry import covering_size
from trainkit.data.settings import parse_resolution
from trainkit.errors import UserError

SQUARE = PreparationSettings(8, 8, resize_mode="crop")
AS_IS = PreparationSettings(32, 32)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photograph(width: int, height: int) -> Image.Image:
    """Smooth with fine texture, and different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    texture = np.random.default_rng(0).normal(0, 10, (height, width, 3))
    smooth = [255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 25 + y / 40)]
    return Image.fromarray((np.stack(smooth, axis=2) + texture).clip(0, 255).astype(np.uint8))


def full_decode(image: bytes, height: int, width: int) -> np.ndarray:
    """The same without shortcuts: all pixels decoded, one antialiased resize, centre crop."""
    whole = Image.open(io.BytesIO(image)).convert("RGB")
    whole = whole.resize(covering_size(whole.size, (width, height)), Image.Resampling.BILINEAR)
    left, top = round((whole.width - width) / 2), round((whole.height - height) / 2)
    return np.asarray(whole.crop((left, top, left + width, top + height))).astype(float)


@pytest.mark.parametrize("size", [(512, 512), (700, 512), (300, 1100)])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_scaled_decoding_is_within_a_grey_level_of_full_decoding(size, format):
    image = encoded(photograph(*size), format)
    settings = PreparationSettings(64, 64, resize_mode="crop")
    difference = np.abs(decode_image(image, settings) - full_decode(image, 64, 64))
    assert difference.mean() < 1
    assert difference.max() < 12


def test_target_is_height_by_width_and_uncropped_images_cover_it():
    image = encoded(photograph(120, 60))
    assert decode_image(image, PreparationSettings(32, 48, resize_mode="crop")).shape == (32, 48, 3)
    assert decode_image(image, PreparationSettings(32, 48)).shape == (32, 64, 3)
    assert decode_image(image, PreparationSettings(20, 80)).shape == (40, 80, 3)
    assert decode_image(encoded(photograph(7, 5)), PreparationSettings(10, 10)).shape == (10, 14, 3)


def test_center_crop_takes_the_centre():
    pixels = np.zeros((32, 96, 3), dtype=np.uint8)
    pixels[:, 32:64] = 200
    cropped = decode_image(encoded(Image.fromarray(pixels)), PreparationSettings(32, 32, resize_mode="crop"))
    assert (cropped == 200).all()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format, orientation):
    upright = photograph(640, 320)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    decoded = decode_image(encoded(stored, format, exif=exif, **options), PreparationSettings(32, 32))
    assert decoded.shape == (32, 64, 3)
    expected = np.asarray(upright.resize((64, 32), Image.Resampling.BILINEAR)).astype(float)
    assert np.abs(decoded - expected).mean() < 2


def test_a_broken_exif_block_costs_the_orientation_and_nothing_else():
    image = encoded(photograph(32, 32), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert decode_image(image, AS_IS).shape == (32, 32, 3)


def half_transparent(kind: str) -> bytes:
    """8x8, grey 40 on the left and transparent on the right, in one of the ways a file can say so."""
    alpha = np.full((8, 8), 255, dtype=np.uint8)
    alpha[:, 4:] = 0
    if kind in ("RGBA", "LA"):
        image = Image.new("RGB", (8, 8), (40, 40, 40))
        image.putalpha(Image.fromarray(alpha))
        return encoded(image.convert(kind))
    indices = Image.fromarray((alpha == 0).astype(np.uint8))
    indices.putpalette([40, 40, 40, 9, 9, 9])
    if kind == "one colour of RGB":
        return encoded(indices.convert("RGB"), transparency=(9, 9, 9))
    if kind == "one grey":
        return encoded(indices.convert("L"), transparency=9)
    return encoded(indices, kind, transparency=1)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "one colour of RGB", "one grey", "PNG", "GIF"])
def test_transparency_shows_the_background(kind):
    file = half_transparent(kind)
    decoded = decode_image(file, dataclasses.replace(SQUARE, background=(255, 0, 128)))
    assert (decoded[:, :4] == 40).all() and (decoded[:, 4:] == (255, 0, 128)).all()
    kept = decode_image(file, dataclasses.replace(SQUARE, image_mode="RGBA"))
    assert (kept[:, :4] == (40, 40, 40, 255)).all() and (kept[:, 4:, 3] == 0).all()
    grey = decode_image(file, dataclasses.replace(SQUARE, image_mode="L", background=(255, 255, 255)))
    assert (grey[:, :4] == 40).all() and (grey[:, 4:] == 255).all()
    deep = decode_image(file, dataclasses.replace(SQUARE, background=(255, 0, 128), bit_depth=16))
    assert np.abs(deep - decoded * 257.0).max() <= 1


def test_resizing_does_not_bleed_the_colour_of_transparent_pixels():
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:, ::2] = (255, 0, 0, 255)  # red stripes; between them transparent black
    decoded = decode_image(encoded(Image.fromarray(pixels)), dataclasses.replace(SQUARE, image_mode="RGBA"))
    assert (decoded[..., 0] > 250).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("image_mode", ["L", "RGB", "RGBA"])
def test_colour_modes(mode, image_mode):
    image = Image.new("RGB", (16, 16), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 8, 16))
    file = encoded(image.convert(mode), "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    decoded = decode_image(file, PreparationSettings(16, 16, image_mode=image_mode)).astype(int)
    assert decoded.shape == (16, 16, {"L": 1, "RGB": 3, "RGBA": 4}[image_mode])
    assert (decoded[:, :8, :3] < 4).all() and (decoded[:, 8:] > 251).all()


def test_cmyk_jpeg_is_not_inverted():
    file = encoded(Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode_image(file, SQUARE).mean((0, 1)) - (200, 40, 40)).max() < 5


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    file = encoded(Image.fromarray(ramp), format)
    settings = PreparationSettings(64, 64, image_mode="L")
    assert np.abs(decode_image(file, settings)[..., 0] - ramp / 257).max() <= 0.51
    kept = decode_image(file, dataclasses.replace(settings, bit_depth=16))
    assert kept.dtype == np.uint16 and (kept[..., 0] == ramp).all()


def test_float_images_are_taken_by_their_range():
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for scale in (1, 255, 65535):
        decoded = decode_image(encoded(Image.fromarray(ramp * scale), "TIFF"), SQUARE)
        assert np.abs(decoded[..., 0] - ramp * 255).max() <= 0.51


def test_8_bit_sources_are_times_257_at_16_bits():
    image = photograph(32, 32)
    decoded = decode_image(encoded(image), dataclasses.replace(AS_IS, bit_depth=16))
    assert decoded.dtype == np.uint16 and (decoded == np.asarray(image).astype(int) * 257).all()


def png_16_bit(pixels: np.ndarray) -> bytes:
    """Pillow writes no 16-bit colour PNG: written here, with the Sub filter, so that unfiltering counts."""
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").tobytes()
    stride, step = width * channels * 2, channels * 2
    lines = np.frombuffer(rows, dtype=np.uint8).reshape(height, stride).copy()
    lines[:, step:] -= np.frombuffer(rows, dtype=np.uint8).reshape(height, stride)[:, :-step]
    data = b"".join(b"\x01" + line.tobytes() for line in lines)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("image_mode", ["RGB", "RGBA"])
def test_16_bit_colour_png_keeps_every_bit(image_mode):
    pixels = np.random.default_rng(0).integers(0, 65536, (16, 16, len(image_mode)))
    pixels[..., 3:] = 65535
    settings = PreparationSettings(16, 16, image_mode=image_mode, bit_depth=16)
    assert (decode_image(png_16_bit(pixels), settings) == pixels).all()


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP"):
        file = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.abs(decode_image(file, SQUARE) - np.array([255, 0, 0])).max() <= 4


def test_faults_are_told_apart(tmp_path):
    whole = encoded(photograph(64, 64), "JPEG")
    faults = {
        "empty": b"",
        "not_an_image": b"hello, this is a text file",
        "truncated": whole[: len(whole) // 2],
        "corrupt": encoded(photograph(64, 64))[:60] + b"x" * 500,
    }
    for fault, content in faults.items():
        path = tmp_path / f"{fault}.jpg"
        path.write_bytes(content)
        for image in (content, path, str(path)):
            with pytest.raises(RejectedImage) as rejection:
                decode_image(image, AS_IS)
            assert rejection.value.fault == fault, str(rejection.value)
    with pytest.raises(RejectedImage) as rejection:
        decode_image(tmp_path / "nowhere.jpg", AS_IS)
    assert rejection.value.fault == "missing"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_unreadable(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(photograph(8, 8)))
    path.chmod(0)
    with pytest.raises(RejectedImage) as rejection:
        decode_image(path, AS_IS)
    assert rejection.value.fault == "unreadable"


@pytest.mark.slow
def test_bombs_are_rejected_without_a_warning():
    file = encoded(Image.new("L", (400, 400)))
    for limit in (400 * 400 - 1, 400 * 400 // 3):  # Pillow warns above its limit, raises above twice that
        with warnings.catch_warnings(record=True) as caught, pytest.raises(RejectedImage) as rejection:
            decode_image(file, dataclasses.replace(AS_IS, max_image_pixels=limit))
        assert rejection.value.fault == "too_large" and not caught
    assert decode_image(file, dataclasses.replace(AS_IS, max_image_pixels=400 * 400)).shape == (32, 32, 3)
    huge = encoded(Image.new("1", (14000, 14000)))  # more than twice Pillow's own limit, in 24 kB
    with pytest.raises(RejectedImage):
        decode_image(huge, AS_IS)
    assert decode_image(huge, dataclasses.replace(AS_IS, max_image_pixels=0)).shape == (32, 32, 3)


def test_of_a_sliver_a_bounded_part_of_the_middle_is_kept():
    pixels = np.zeros((3, 2001), dtype=np.uint8)
    pixels[:, 990:1011] = 200
    for file in (encoded(Image.fromarray(pixels)), encoded(Image.fromarray(pixels), "JPEG", quality=100)):
        stored = decode_image(file, PreparationSettings(64, 64))
        assert stored.shape == (64, 512, 3) and (stored[:, 64:-64] > 190).all()
    on_its_side = encoded(Image.fromarray(pixels.T.copy()))
    assert decode_image(on_its_side, PreparationSettings(32, 64)).shape == (256, 64, 3)
    assert decode_image(encoded(Image.new("L", (60000, 1))), PreparationSettings(64, 64)).shape == (64, 512, 3)


def test_postscript_is_never_run():
    with pytest.raises(RejectedImage) as rejection:
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", AS_IS)
    assert rejection.value.fault == "not_an_image"


def test_resolution_is_a_side_or_height_by_width():
    assert parse_resolution("64") == (64, 64)
    assert parse_resolution("64x96") == (64, 96)
    for wrong in ("", "x", "64x", "-3", "6.5", "1x2x3", "0x4"):
        with pytest.raises(UserError, match="--resolution"):
            parse_resolution(wrong)
