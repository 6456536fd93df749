"""An image of any shape comes to the stored size by crop, random_crop, pad or stretch, upright whatever EXIF says."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainkit.data.images.decode import decode_image
from trainkit.data.images.geometry import bounded_part, center_box, covering_size, fitting_size
from trainkit.data.settings import PreparationSettings

MODES = ("crop", "random_crop", "pad", "stretch")
SHAPES = {"crop": (32, 48), "random_crop": (32, 64), "pad": (32, 48), "stretch": (32, 48)}


ANY_SIZE, ANY_TARGET = (st.tuples(st.integers(1, most), st.integers(1, most)) for most in (20_000, 1024))


@given(ANY_SIZE, ANY_TARGET)
def test_boxes_of_any_size_lie_inside_and_cover_the_target(size, target):
    part = bounded_part(size, target)
    assert all(1 <= kept <= side for kept, side in zip(part, size, strict=True))
    covering, fitting = covering_size(part, target), fitting_size(size, target)
    for found in (covering, fitting):
        assert any(side == wanted for side, wanted in zip(found, target, strict=True))
    assert all(side >= wanted for side, wanted in zip(covering, target, strict=True))
    assert all(1 <= side <= wanted for side, wanted in zip(fitting, target, strict=True))
    left, top, right, bottom = center_box(covering, target)
    assert (right - left, bottom - top) == target
    assert left >= 0 and top >= 0 and right <= covering[0] and bottom <= covering[1]


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def landscape(width: int = 640, height: int = 320) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 50 + y / 80)]
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))


def by_hand(image: Image.Image, mode: str) -> np.ndarray:
    """32x48 of a 2:1 landscape without shortcuts, on green."""
    if mode == "stretch":
        return np.asarray(image.resize((48, 32), Image.Resampling.BILINEAR))
    if mode == "pad":
        canvas = Image.new("RGB", (48, 32), (0, 255, 0))
        canvas.paste(image.resize((48, 24), Image.Resampling.BILINEAR), (0, 4))
        return np.asarray(canvas)
    whole = np.asarray(image.resize((64, 32), Image.Resampling.BILINEAR))
    return whole[:, 8:56] if mode == "crop" else whole


@pytest.mark.parametrize("bit_depth", [8, 16])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_every_orientation(mode, format, bit_depth):
    upright = landscape()
    settings = PreparationSettings(32, 48, resize_mode=mode, background=(0, 255, 0), bit_depth=bit_depth)
    expected = by_hand(upright, mode).astype(float)
    for orientation, undo in {1: None, 3: 3, 5: 5, 6: 2, 7: 6, 8: 4}.items():
        stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
        exif = Image.Exif()
        exif[0x0112] = orientation
        decoded = decode_image(encoded(stored, format, exif=exif), settings)
        assert decoded.shape == (*SHAPES[mode], 3) and decoded.dtype == f"uint{bit_depth}"
        assert np.abs(decoded / (257 if bit_depth == 16 else 1) - expected).mean() < 2


@pytest.mark.parametrize("bit_depth", [8, 16])
@pytest.mark.parametrize("size", [(40, 20), (20, 40), (6, 3), (400, 200), (1000, 1)])
def test_padding_shows_the_whole_image_on_the_background(size, bit_depth):
    red = encoded(Image.new("RGB", size, "red"))
    settings = PreparationSettings(16, 16, resize_mode="pad", background=(0, 0, 255), bit_depth=bit_depth)
    full = 2**bit_depth - 1
    decoded = decode_image(red, settings)
    is_red = (decoded == (full, 0, 0)).all(axis=2)
    assert ((decoded == (0, 0, full)).all(axis=2) | is_red).all()
    inside = max(1, round(16 * min(size) / max(size)))
    assert is_red.sum() == inside * 16 and is_red.any(axis=0 if size[0] > size[1] else 1).all()
    rows = np.flatnonzero(is_red.all(axis=1 if size[0] > size[1] else 0))
    assert abs((rows[0] + rows[-1]) / 2 - 7.5) <= 0.5
    clear = decode_image(red, dataclasses.replace(settings, image_mode="RGBA"))
    assert (clear[is_red] == (full, 0, 0, full)).all() and (clear[~is_red] == 0).all()
    grey = decode_image(red, dataclasses.replace(settings, image_mode="L"))[..., 0]
    assert np.abs(grey[~is_red] / full - 0.114).max() < 0.01 and np.abs(grey[is_red] / full - 0.299).max() < 0.01


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bit_depth", [8, 16])
def test_slivers_stay_small(mode, bit_depth):
    for size in ((20000, 3), (3, 20000), (1, 1)):
        settings = PreparationSettings(64, 32, resize_mode=mode, bit_depth=bit_depth)
        decoded = decode_image(encoded(Image.new("RGB", size, "red")), settings)
        if mode != "random_crop":
            assert decoded.shape == (64, 32, 3)
        assert decoded.shape[0] >= 64 and decoded.shape[1] >= 32 and decoded.size <= 8 * 64 * 32 * 3
