"""Conditioning images are decoded, resized and cropped as their images are; label maps keep their ids."""

import io
import shutil
import struct
import zlib

import datasets
import numpy as np
import pytest
from pair_helpers import CLASSES, MAPS, prepared_pairs, write_pairs
from PIL import Image
from source_files import SETTINGS

from trainkit.data.faults import RejectedImage
from trainkit.data.images.conditions import decode_label_map, decode_pair
from trainkit.data.images.geometry import is_same_shape
from trainkit.data.loading.conditioning_images import ConditioningImages
from trainkit.data.pairing import PairSettings
from trainkit.data.settings import PreparationSettings
from trainkit.errors import UserError


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs")


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def two_bit_grey(ids):
    """A PNG (16, 16) of grey levels with 2 bits, which Pillow reads but does not write."""
    packed = (ids.reshape(16, 4, 4) << np.array([6, 4, 2, 0], dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
    lines = b"".join(b"\0" + row.tobytes() for row in packed)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 16, 16, 2, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ]
    parts = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("storage", ["pixels", "png"])
@pytest.mark.parametrize("mode", ["crop", "random_crop", "pad", "stretch"])
def test_a_pair_is_resized_and_cropped_alike(tmp_path, mode, storage):
    """The conditioning image is the image, so both must be the same afterwards; one lies on its side in its file."""
    for number, (size, turn) in enumerate({(61, 40): 0, (33, 90): 1, (48, 48): 0}.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image, exif = Image.fromarray(pixels), Image.Exif()
        for folder in ("images", "same"):
            (tmp_path / folder).mkdir(exist_ok=True)
        image.save(tmp_path / "images" / f"{number}.png")
        if turn:
            exif[0x0112], image = 6, image.transpose(Image.Transpose.ROTATE_90)
        image.save(tmp_path / "same" / f"{number}.png", exif=exif)
    settings = PreparationSettings(24, 32, mode, storage=storage)
    flags = {"conditioning_data_dir": str(tmp_path / "same")}
    images, same, _ = prepared_pairs(tmp_path / "images", tmp_path / "out", settings, **flags)
    assert np.array_equal(images.gather(np.arange(3)), same)
    crops = np.array([[0.1, 0.9], [0.7, 0.2], [0.99, 0.99]])
    cropped = images.gather(np.arange(3), crops)
    assert np.array_equal(cropped, ConditioningImages(images).gather(np.arange(3), crops))
    assert np.array_equal(cropped, same) == (mode != "random_crop")


def test_a_smaller_conditioning_image_of_the_same_shape_fits():
    assert is_same_shape((640, 480), (640, 480)) and is_same_shape((62, 46), (500, 375))
    assert not is_same_shape((640, 479), (640, 480)) and not is_same_shape((48, 64), (640, 480))
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    image[:, 32:] = 255
    small = encoded(Image.fromarray(image[::4, ::4]))
    for mode in ("crop", "random_crop", "pad", "stretch"):
        settings = PreparationSettings(16, 16, mode)
        pixels, condition = decode_pair(encoded(Image.fromarray(image)), small, settings, PairSettings("L"))
        assert pixels.shape[:2] == condition.shape[:2]
        assert np.abs(pixels[..., :1].astype(int) - condition).mean() < 8


def test_label_maps_of_every_kind_keep_their_ids():
    ids = np.arange(16, dtype=np.uint8).reshape(4, 4).repeat(4, axis=0).repeat(4, axis=1) % 4
    palette = Image.fromarray(ids).convert("P")
    palette.putdata(ids.reshape(-1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    settings = PreparationSettings(8, 8, "stretch")
    files = [
        encoded(Image.fromarray(ids)), encoded(palette), encoded(palette, bits=2), two_bit_grey(ids),
        encoded(Image.fromarray(ids), "TIFF"), encoded(Image.fromarray(ids.astype(np.uint16))),
    ]  # fmt: skip
    for content in files:
        found = decode_label_map(content, settings, 4)
        assert found.dtype == np.uint8 and np.array_equal(found[..., 0], ids[1::2, 1::2])


@pytest.mark.parametrize("storage", ["jpeg", "webp"])
def test_label_maps_are_stored_without_loss(pairs, tmp_path, storage):
    flags = {"conditioning_data_dir": str(pairs[1])} | MAPS
    exact, lossy = (
        prepared_pairs(
            pairs[0], tmp_path / kind, PreparationSettings(16, 16, storage=kind, storage_quality=quality), **flags
        )
        for kind, quality in (("pixels", 100), (storage, 50))
    )
    assert np.array_equal(exact[1], lossy[1])
    assert not np.array_equal(exact[0].gather(np.arange(8)), lossy[0].gather(np.arange(8)))
    shown = datasets.load_from_disk(tmp_path / storage)[0]["conditioning_image"]
    assert shown.format == "PNG" and set(np.unique(shown)) <= set(range(CLASSES))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_pictures_are_stored_in_their_own_mode(pairs, tmp_path, mode):
    flags = {"conditioning_data_dir": str(pairs[0]), "conditioning_image_mode": mode}
    settings = PreparationSettings(16, 16, "crop", "L", bit_depth=16)
    images, found, _ = prepared_pairs(shutil.copytree(pairs[0], tmp_path / "in"), tmp_path / "out", settings, **flags)
    assert (images.channels, found.shape[-1], found.dtype) == (1, {"L": 1, "RGB": 3, "RGBA": 4}[mode], np.uint16)
    if mode == "L":
        assert np.array_equal(images.gather(np.arange(8)), found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            encoded(Image.new("L", (28, 20), 4)),
            "--conditioning_classes 4: b/01.png: .*01.png: it holds the id 4, and ",
        ),
        (encoded(Image.new("RGB", (28, 20))), "b/01.png: .*01.png: it has 3 channels .RGB., and a label map has one"),
        (encoded(Image.new("L", (28, 20)), "JPEG"), "b/01.png: .*01.png: JPEG changes ids: save label maps as PNG"),
    ],
)
def test_what_is_no_label_map_stops_the_preparation(pairs, tmp_path, content, message):
    (pairs[1] / "b" / "01.png").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        prepared_pairs(pairs[0], tmp_path / "out", conditioning_data_dir=str(pairs[1]), **MAPS)
    assert "\n" not in str(error.value)
    with pytest.raises(RejectedImage):
        decode_label_map(content, SETTINGS, CLASSES)
