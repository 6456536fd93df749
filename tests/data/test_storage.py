"""Prepared images as pixels, PNG, JPEG or WebP: the same arrays in training, pictures to stock `datasets`."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from source_files import DataOptions as Options

from trainkit.data.cache import open_or_prepare
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.loader import BatchLoader, BatchShape
from trainkit.data.preparation.prepare import prepare
from trainkit.data.settings import PreparationSettings, settings_from_options
from trainkit.data.sources.folder import ImageFolder
from trainkit.errors import UserError
from trainkit.training.validation import open_validation_images


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """24 smooth pictures of 16 to 30 by 24 pixels with transparency, half of them grey of 16 bits."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(24):
        y, x = np.mgrid[0 : 16 + number % 15, 0:24]
        planes = [120 + 100 * np.sin(x / 9 + number), 120 + 100 * np.cos(y / 7), 5 * x, 255 - 9 * y * (number % 2)]
        if number % 2:
            picture = Image.fromarray(np.stack(planes, axis=2).clip(0, 255).astype(np.uint8))
        else:
            picture = Image.fromarray((planes[0] * 257 + y).astype(np.uint16))
        picture.save(folder / f"{number:03d}.png")
    return folder


def prepared(photos: Path, output: Path, **settings) -> PreparedImages:
    settings = PreparationSettings(**{"height": 12, "width": 16} | settings)
    prepare(ImageFolder(photos), settings, output, num_proc=1, show_progress=False)
    return PreparedImages(output)


@pytest.mark.parametrize("resize_mode", ["crop", "random_crop"])
@pytest.mark.parametrize("image_mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("storage, bit_depth", [("png", 8), ("webp", 8), ("png", 16)])
def test_lossless_storage_is_bit_equal_to_pixels(photos, tmp_path, resize_mode, image_mode, storage, bit_depth):
    settings = {"resize_mode": resize_mode, "image_mode": image_mode, "bit_depth": bit_depth}
    plain = prepared(photos, tmp_path / "plain", **settings)
    encoded = prepared(photos, tmp_path / "encoded", storage=storage, **settings)
    indices = np.random.default_rng(0).permutation(24)
    crops = np.random.default_rng(1).random((24, 2))
    for arguments in ((indices, crops), (indices,)):
        expected = plain.gather(*arguments)
        found = encoded.gather(*arguments)
        assert found.dtype == expected.dtype == f"uint{bit_depth}" and found.shape[1:3] == (12, 16)
        assert (found == expected).all()
    assert encoded.fingerprint != plain.fingerprint


@pytest.mark.parametrize("storage, image_mode, error", [("jpeg", "RGB", 3), ("jpeg", "L", 2), ("webp", "RGBA", 6)])
def test_lossy_storage_is_close_and_its_quality_counts(photos, tmp_path, storage, image_mode, error):
    settings = {"resize_mode": "crop", "image_mode": image_mode}
    expected = prepared(photos, tmp_path / "plain", **settings).gather(np.arange(24)).astype(int)
    errors = []
    for quality in (95, 20):
        images = prepared(photos, tmp_path / str(quality), storage=storage, storage_quality=quality, **settings)
        errors.append(np.abs(images.gather(np.arange(24)) - expected).mean())
    assert 0 < errors[0] < error and errors[0] < errors[1]


@pytest.mark.parametrize("storage", ["png", "jpeg", "webp"])
def test_stock_datasets_decodes_pictures(photos, tmp_path, storage):
    images = prepared(photos, tmp_path / "out", storage=storage)
    stock = datasets.load_from_disk(str(tmp_path / "out"))
    assert isinstance(stock.features["image"], datasets.Image) and len(stock) == 24
    row = stock[5]
    assert row["image"].format == storage.upper() and row["image"].mode == "RGB"
    assert row["image"].size == (row["width"], row["height"]) and row["source"] == "005.png"
    top, left = round((row["height"] - 12) / 2), round((row["width"] - 16) / 2)
    centre = np.asarray(row["image"])[top : top + 12, left : left + 16]
    assert (centre == images.gather(np.array([5]))[0]).all()


def test_16_bit_grey_is_a_16_bit_picture_to_stock_datasets(photos, tmp_path):
    prepared(photos, tmp_path / "out", storage="png", bit_depth=16, image_mode="L", resize_mode="crop")
    picture = datasets.load_from_disk(str(tmp_path / "out"))[0]["image"]
    assert picture.mode == "I;16" and np.asarray(picture).max() > 50_000


def test_threads_decode_the_same_batches(photos, tmp_path):
    plain = prepared(photos, tmp_path / "plain")
    encoded = prepared(photos, tmp_path / "encoded", storage="png")
    shape, device = BatchShape(8, 1, 1, 0), torch.device("cpu")
    expected = list(BatchLoader(plain, shape, 0, False, device, 0).iterate(0, 5))
    found = list(BatchLoader(encoded, shape, 0, False, device, 3).iterate(0, 5))
    assert all(torch.equal(a.images, b.images) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"storage": "jpeg", "image_mode": "RGBA"},
            "--storage jpeg stores no transparency; give --storage png or webp",
        ),
        ({"storage": "webp", "preserve_input_precision": True}, "--storage webp stores 8 bits .* --storage png"),
        ({"storage": "jpeg", "preserve_input_precision": True}, "--storage jpeg stores 8 bits"),
        ({"storage_quality": 0}, "--storage_quality 0 must be from 1 to 100"),
        ({"resize_mode": "pad", "center_crop": True}, "--center_crop means --resize_mode crop, not pad"),
        ({"stored_resolution": "48"}, "--resolution 64x64, stored at 48x48: .* at least as large"),
        ({"stored_resolution": "96x128"}, "the same aspect ratio"),
        ({"stored_resolution": "big"}, "--stored_resolution big is not a size"),
        ({"min_size": -1}, "--min_size -1"),
        ({"max_image_pixels": -1}, "--max_image_pixels -1"),
        ({"max_aspect_ratio": 0.5}, "--max_aspect_ratio 0.5"),
        ({"max_aspect_ratio": float("nan")}, "--max_aspect_ratio nan"),
    ],
)
def test_what_cannot_work_is_refused_at_once(given, message):
    with pytest.raises(UserError, match=message):
        settings_from_options(Options(**given))


def test_center_crop_is_the_resize_mode_of_that_name():
    assert settings_from_options(Options(center_crop=True)) == settings_from_options(Options(resize_mode="crop"))
    assert settings_from_options(Options()).resize_mode == "random_crop"
    # What has no effect is no part of the fingerprint.
    assert settings_from_options(Options(storage_quality=50)) == settings_from_options(Options())
    assert settings_from_options(Options(storage="jpeg", storage_quality=50)).storage_quality == 50


def test_a_larger_stored_size_trains_at_any_resolution_below(photos, tmp_path, capsys):
    raw = Options(train_data_dir=str(photos), cache_dir=str(tmp_path), resolution="8", stored_resolution="32")
    images = open_or_prepare(raw)
    assert (images.height, images.width, images.stored_height, images.stored_width) == (8, 8, 32, 32)
    assert images.gather(np.arange(3)).shape == (3, 32, 32, 3)
    capsys.readouterr()
    smaller = open_or_prepare(dataclasses.replace(raw, resolution="16"))
    assert smaller.folder == images.folder and smaller.height == 16 and "preparing" not in capsys.readouterr().out

    given = Options(train_data_dir=str(images.folder))
    assert open_or_prepare(given).height == 8
    for resolution, height in {"12": 12, "32": 32}.items():
        assert open_or_prepare(dataclasses.replace(given, resolution=resolution)).height == height
    for contradiction, message in {
        ("resolution", "40"): "must be at least as large as --resolution",
        ("resolution", "8x16"): "the same aspect ratio",
        ("stored_resolution", "48"): "--stored_resolution 48, but .* holds 32x32",
        ("resize_mode", "pad"): "--resize_mode pad .* was prepared with random_crop",
        ("center_crop", True): "--resize_mode crop .* was prepared with random_crop",
    }.items():
        with pytest.raises(UserError, match=message):
            open_or_prepare(dataclasses.replace(given, **dict([contradiction])))


def test_preparing_for_another_resolution_changes_no_stored_byte(photos, tmp_path):
    images = prepared(photos, tmp_path / "out", train_height=6, train_width=8)
    stamps = [path.stat().st_mtime_ns for path in (tmp_path / "out").glob("data-*")]
    again = prepared(photos, tmp_path / "out", train_height=3, train_width=4)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "out").glob("data-*")] == stamps
    assert (images.height, images.width, again.height, again.width) == (6, 8, 3, 4)


def test_batches_come_at_the_training_size(photos, tmp_path):
    images = prepared(photos, tmp_path / "out", resize_mode="crop", train_height=6, train_width=8)
    batch = next(BatchLoader(images, BatchShape(24, 1, 1, 0), 0, False, torch.device("cpu"), 0).iterate(0, 1))
    assert batch.images.shape == batch.noise.shape == (24, 3, 6, 8)
    for index, image in zip(batch.indices, batch.images, strict=True):
        stored = Image.fromarray(images.gather(np.array([index]))[0])
        expected = np.asarray(stored.resize((8, 6), Image.Resampling.BILINEAR)) / 127.5 - 1
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() < 0.02


def test_held_out_images_that_are_stored_larger_come_at_the_training_size(photos, tmp_path):
    stored_larger = {"train_height": 6, "train_width": 8}
    trained_on = prepared(photos, tmp_path / "train", height=3, width=4)
    prepared(photos, tmp_path / "held_out", **stored_larger)
    options = SimpleNamespace(
        validation_data_dir=str(tmp_path / "held_out"),
        validation_split=None,
        validation_steps=1,
        validation_images=4,
        train_data_dir=None,
        storage_options=None,
    )
    held_out = open_validation_images(options, trained_on)
    assert (held_out.height, held_out.width, held_out.stored_height) == (3, 4, 12)


def test_another_version_of_the_format_is_one_line(photos, tmp_path):
    prepared(photos, tmp_path / "out")
    description = tmp_path / "out" / "preparation.json"
    description.write_text(re.sub('"format": [0-9]+', '"format": 1', description.read_text()))
    with pytest.raises(UserError, match="another version of these scripts; prepare the images again"):
        PreparedImages(tmp_path / "out")
