"""Colour spaces and embedded profiles: everything is seen as sRGB."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from trainkit.data.images.decode import decode_image
from trainkit.data.settings import PreparationSettings

SETTINGS = PreparationSettings(8, 8, resize_mode="crop")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(image: Image.Image, format: str = "PNG", image_mode: str = "RGB", **options) -> list[int]:
    """The colour of an image of one colour."""
    settings = PreparationSettings(8, 8, resize_mode="crop", image_mode=image_mode)
    return decode_image(encoded(image, format, **options), settings).reshape(64, -1).mean(axis=0).round().tolist()


def red_and_blue_swapped() -> bytes:
    """An sRGB profile whose red is blue."""
    swapped = SRGB[128:].replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)
    return SRGB[:128] + swapped


def icc_profile(device_class: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """The file that ICC.1:2001 describes: header, table of tags, tags."""
    start, table, content = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(content), len(data))
        content += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(content), b"test", 0x02400000, device_class, space, connection)
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3I", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + content


def text_tags() -> dict[bytes, bytes]:
    description = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    return {b"desc": description, b"cprt": b"text" + bytes(4) + b"none\0"}


def linear_grey() -> bytes:
    white = b"XYZ " + bytes(4) + struct.pack(">3I", 63190, 65536, 54061)
    curve = b"curv" + bytes(4) + struct.pack(">I", 0)
    return icc_profile(b"mntr", b"GRAY", b"XYZ ", {**text_tags(), b"wtpt": white, b"kTRC": curve})


def cyan_ink_is_dark_green() -> bytes:
    """CMYK by a table of 16 corners: paper is white, and whatever has cyan ink is of one dark green."""
    corners = [(100, 40, 170) if corner & 8 else (255, 128, 128) for corner in range(16)]
    identity = [1, 0, 0, 0, 1, 0, 0, 0, 1]
    table = b"mft1" + bytes(4) + struct.pack(">4B", 4, 3, 2, 0) + struct.pack(">9i", *(65536 * x for x in identity))
    table += bytes(range(256)) * 4 + bytes(sum(corners, ())) + bytes(range(256)) * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3I", 63190, 65536, 54061)
    return icc_profile(b"prtr", b"CMYK", b"Lab ", {**text_tags(), b"wtpt": white, b"A2B0": table, b"A2B1": table})


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_an_embedded_profile_is_applied(format):
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format == "JPEG" else {}
    red = Image.new("RGB", (8, 8), (200, 0, 0))
    seen = decoded(red, format, icc_profile=red_and_blue_swapped(), **options)
    assert np.abs(np.array(seen) - (0, 0, 200)).max() <= 8
    grey = decoded(red, format, "L", icc_profile=red_and_blue_swapped(), **options)
    assert abs(grey[0] - 0.114 * 200) <= 4


def test_transparency_and_palettes_keep_theirs_under_a_profile():
    profile = red_and_blue_swapped()
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 77))
    assert decoded(clear, image_mode="RGBA", icc_profile=profile)[2:] == [pytest.approx(200, abs=8), 77]
    palette = Image.new("P", (8, 8))
    palette.putpalette([200, 0, 0])
    assert decoded(palette, icc_profile=profile)[2] == pytest.approx(200, abs=8)
    marked = Image.new("RGB", (8, 8), (200, 0, 0))
    assert decoded(marked, image_mode="RGBA", icc_profile=profile, transparency=(200, 0, 0))[3] == 0


def test_a_grey_profile_is_a_curve():
    for mode in ("L", "LA"):
        picture = Image.new("L", (8, 8), 128).convert(mode)
        for image_mode in ("L", "RGB", "RGBA"):
            seen = decoded(picture, image_mode=image_mode, icc_profile=linear_grey())
            assert seen[0] == pytest.approx(188, abs=2), (mode, image_mode)  # linear light 0.5 is 188 in sRGB


def test_a_cmyk_profile_is_used():
    picture = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for format in ("TIFF", "JPEG"):
        red, green, blue = decoded(picture, format, icc_profile=cyan_ink_is_dark_green())
        assert green > red and green > blue and green < 140
        assert decoded(Image.new("CMYK", (8, 8)), format, icc_profile=cyan_ink_is_dark_green()) == [255, 255, 255]


@pytest.mark.parametrize("profile", [SRGB, b"no profile", SRGB[:200], linear_grey(), cyan_ink_is_dark_green()])
def test_srgb_broken_and_foreign_profiles_change_nothing(profile):
    picture = Image.effect_noise((8, 8), 90).convert("RGB")
    plain = decode_image(encoded(picture), SETTINGS)
    assert (decode_image(encoded(picture, icc_profile=profile), SETTINGS) == plain).all()


def test_lab_is_a_colour_space_of_its_own():
    lab = ImageCms.applyTransform(
        Image.new("RGB", (8, 8), (200, 40, 90)),
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    assert np.abs(np.array(decoded(lab, "TIFF")) - (200, 40, 90)).max() <= 4
    assert abs(decoded(lab, "TIFF", "L")[0] - 94) <= 4


def test_adobe_cmyk_and_ycck_jpegs_are_not_inverted():
    inks = Image.new("CMYK", (8, 8), (20, 200, 160, 10))
    file = encoded(inks, "JPEG", quality=100)
    assert b"Adobe" in file
    expected = np.asarray(inks.convert("RGB"))[0, 0].astype(int)
    assert np.abs(decode_image(file, SETTINGS).mean((0, 1)) - expected).max() < 4


def test_negative_floats_and_the_marked_grey_of_16_bits():
    ramp = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    ramp[0, 0] = np.nan
    seen = decode_image(encoded(Image.fromarray(ramp), "TIFF"), SETTINGS)[..., 0]
    assert np.abs(seen - np.nan_to_num(ramp + 1, nan=1.0) * 127.5).max() <= 0.51
    samples = np.full((8, 8), 40000, dtype=np.uint16)
    samples[:, 4:] = 300
    file = encoded(Image.fromarray(samples), transparency=300)
    for bit_depth, full in ((8, 255), (16, 65535)):
        settings = PreparationSettings(8, 8, resize_mode="crop", image_mode="RGBA", bit_depth=bit_depth)
        seen = decode_image(file, settings) / full
        assert (seen[:, :4, 3] == 1).all() and (seen[:, 4:, 3] == 0).all()
        assert np.abs(seen[:, :4, :3] - 40000 / 65535).max() < 0.003
