"""HDF5 in, and a prepared dataset out to it: the same bits there and back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from process_helpers import run_forked
from source_files import assert_same, files_of, open_given, prepared, write_photos

from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation import prepare as prepare_module
from trainkit.data.preparation.export import export_hdf5
from trainkit.data.settings import PreparationSettings
from trainkit.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)


def write_hdf5(path: Path, **arrays) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def run(*arguments) -> subprocess.CompletedProcess:
    return run_forked("prepare_dataset.py", *arguments, check=False)


@pytest.mark.parametrize(
    "pixels",
    [
        PIXELS,
        PIXELS.transpose(0, 3, 1, 2),
        (PIXELS / 255).astype(np.float32),
        (PIXELS / 255).transpose(0, 3, 1, 2),
        PIXELS.astype(np.uint16) * 257,
    ],
)
def test_layouts_and_types_give_the_same_pixels(tmp_path, pixels):
    path = write_hdf5(tmp_path / "x.h5", data=pixels)
    assert np.array_equal(prepared(path, tmp_path / "out").pixels, PIXELS)


def test_arrays_are_resized_like_files(tmp_path):
    from PIL import Image

    large = np.random.default_rng(1).integers(0, 256, (5, 40, 30, 3), dtype=np.uint8)
    for number, pixels in enumerate(large):
        (tmp_path / "files").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"files/{number}.png")
    path = write_hdf5(tmp_path / "x.hdf5", images=large)
    wanted = prepared(tmp_path / "files", tmp_path / "wanted").pixels
    assert np.array_equal(prepared(path, tmp_path / "out").pixels, wanted)
    grey = write_hdf5(tmp_path / "grey.h5", digits=large[..., :1], other=np.zeros(3))
    settings = PreparationSettings(16, 16, resize_mode="crop", image_mode="L")
    assert prepared(grey, tmp_path / "grey", settings).pixels.shape == (5, 16, 16, 1)


def test_labels_captions_and_vectors(tmp_path):
    words, numbers = ["cat", "dog"] * 10, [3, -1, 12, 3] * 5
    vectors = np.random.default_rng(0).normal(size=(20, 4))
    arrays = {"data": PIXELS, "captions": [f"number {n}" for n in range(20)], "vectors": vectors}
    found = prepared(write_hdf5(tmp_path / "x.h5", labels=numbers, **arrays), tmp_path / "out")
    assert found.label_names == ["3", "12"] and found.labels == [0, -1, 1, 0] * 5
    assert found.texts[3] == "number 3" and np.array_equal(found.vectors, vectors.astype(np.float32))
    found = prepared(write_hdf5(tmp_path / "y.h5", labels=words, **arrays), tmp_path / "out")
    assert found.label_names == ["cat", "dog"] and found.labels == [0, 1] * 10
    assert found.names[19] == "row 19"


def test_what_is_ambiguous_is_refused_in_one_line(tmp_path, monkeypatch):
    cases = [
        ({"data": PIXELS / 127.5 - 1}, r"floats from -1 to 1, wanted \[0, 1\]: store \(x \+ 1\) / 2"),
        ({"data": PIXELS.astype(np.float32)}, r"floats from 0 to 255, wanted \[0, 1\]: store uint8"),
        ({"data": PIXELS.astype(np.int64)}, "is int64; store uint8"),
        ({"data": PIXELS[:, :3]}, r"may have its channels first or last; .*attrs\['layout'\] = 'NHWC'"),
        ({"data": PIXELS[..., :2]}, "is not .N, H, W, C. or .N, C, H, W. of 1, 3 or 4"),
        ({"data": PIXELS[:0]}, "holds no image"),
        ({"a": PIXELS, "b": PIXELS}, "has no array `data`"),
        ({"numbers": np.zeros(3)}, r"has no array `data` of .*; it has numbers \(3,\)"),
        ({"data": PIXELS, "labels": [1, 2]}, "`labels` has 2 rows for 20 images"),
    ]
    for arrays, message in cases:
        with pytest.raises(UserError, match=message):
            open_given(write_hdf5(tmp_path / "x.h5", **arrays))
    with pytest.raises(UserError, match="--vector_column embedding: .* has no such array"):
        open_given(write_hdf5(tmp_path / "x.h5", data=PIXELS), vector_column="embedding")
    content = (tmp_path / "x.h5").read_bytes()
    for damaged in (b"", b"no hdf5" * 99, content[:-3000]):
        (tmp_path / "x.h5").write_bytes(damaged)
        with pytest.raises(UserError, match="x.h5 is not a whole HDF5 file"):
            open_given(tmp_path / "x.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="needs the package h5py: pip install h5py"):
        open_given(tmp_path / "x.h5")


def test_a_layout_may_be_told(tmp_path):
    path = write_hdf5(tmp_path / "x.h5", data=PIXELS[:, :3])
    with h5py.File(path, "a") as file:
        file["data"].attrs["layout"] = "NHWC"
    assert open_given(path).reader.read(2).image.shape == (3, 16, 3)


def test_bad_images_are_rejected_one_by_one(tmp_path):
    pixels = (PIXELS / 255).astype(np.float32)
    pixels = np.concatenate([pixels] * 5)
    pixels[7, 0, 0, 0], pixels[8, 0, 0, 0] = 3.0, np.nan  # none of the rows that are looked at beforehand
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=pixels, chunks=(1, 16, 16, 3), compression="gzip")
        place = file["data"].id.get_chunk_info(50).byte_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)
    found = prepared(path, tmp_path / "out")
    assert found.rejected == {"corrupt": 1, "out_of_range": 2} and len(found.names) == 97


def test_several_workers_read_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "SLICE_ITEMS", 8)
    path = write_hdf5(tmp_path / "x.h5", data=np.concatenate([PIXELS] * 10), labels=np.arange(200))
    for num_proc in (1, 2):
        prepared(path, tmp_path / str(num_proc), num_proc=num_proc)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


@pytest.mark.parametrize("compression", ["none", "lzf", "gzip"])
def test_there_and_back(tmp_path, compression):
    write_photos(tmp_path / "photos")
    wanted = prepared(tmp_path / "photos", tmp_path / "out")
    export_hdf5(PreparedImages(tmp_path / "out"), tmp_path / "x.h5", compression)
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["data"].chunks == (1, 16, 16, 3) and file["data"].dtype == np.uint8
        assert file["data"].compression == (None if compression == "none" else compression)
        assert np.array_equal(file["data"][:], wanted.pixels) and file["labels"][:].tolist() == wanted.labels
        assert list(file.attrs["class_names"]) == ["a", "b"]
    assert_same(prepared(tmp_path / "x.h5", tmp_path / "back"), wanted, with_names=False)


@pytest.mark.parametrize("image_mode, bit_depth", [("RGBA", 8), ("L", 8), ("RGB", 16), ("L", 16), ("RGBA", 16)])
def test_there_and_back_in_every_mode(tmp_path, image_mode, bit_depth):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 4), dtype=np.uint8)
        Image.fromarray(pixels, "RGBA").save(tmp_path / f"photos/{number}.png")
    settings = PreparationSettings(4, 4, "crop", image_mode, bit_depth=bit_depth)
    wanted = prepared(tmp_path / "photos", tmp_path / "out", settings)
    export_hdf5(PreparedImages(tmp_path / "out"), tmp_path / "x.h5")
    assert np.array_equal(prepared(tmp_path / "x.h5", tmp_path / "back", settings).pixels, wanted.pixels)


@pytest.mark.slow
def test_the_flag(tmp_path):
    write_photos(tmp_path / "photos", 6)
    folder, file = tmp_path / "out", tmp_path / "x.h5"
    given = ["--train_data_dir", tmp_path / "photos", "--output_dir", folder, "--resolution", "16"]
    done = run(*given, "--export_hdf5", file)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "add --center_crop" in done.stderr
    assert not folder.exists(), "refused before the long part"
    done = run(*given, "--center_crop", "--export_hdf5", file, "--hdf5_compression", "lzf")
    assert done.returncode == 0 and "x.h5: 6 images" in done.stdout, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos", "x.h5"]
    again = run("--train_data_dir", folder, "--export_hdf5", file, "--hdf5_compression", "lzf")
    assert again.returncode == 0 and "x.h5 is up to date" in again.stdout
    other = run("--train_data_dir", folder, "--export_hdf5", file)
    assert other.returncode == 0 and "6 images" in other.stdout
    (tmp_path / "mine.h5").write_bytes(b"my thesis")
    for name, message in (
        ("mine.h5", "was not written by an export"),
        ("x.txt", "must end in .h5"),
        ("no/x.h5", "folder does not exist"),
    ):
        done = run("--train_data_dir", folder, "--export_hdf5", tmp_path / name)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert (tmp_path / "mine.h5").read_bytes() == b"my thesis"


def test_images_of_several_sizes_and_a_full_disk_are_one_line(tmp_path, monkeypatch):
    write_photos(tmp_path / "photos", 6)
    prepared(tmp_path / "photos", tmp_path / "whole", PreparationSettings(16, 16))
    with pytest.raises(UserError, match="needs images of one size"):
        export_hdf5(PreparedImages(tmp_path / "whole"), tmp_path / "x.h5")
    prepared(tmp_path / "photos", tmp_path / "out")
    images = PreparedImages(tmp_path / "out")

    def full(indices):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(images, "gather", full)
    with pytest.raises(UserError, match="x.h5 cannot be written .No space left on device."):
        export_hdf5(images, tmp_path / "x.h5")
    assert not list(tmp_path.glob("x.h5*"))
    assert json.loads((tmp_path / "out/preparation.json").read_text())["num_images"] == 6
