"""Pairs in HDF5 files: names, layouts and types of the array of conditioning images, faults, and the way back."""

import json

import h5py
import numpy as np
import pytest
from pair_helpers import CLASSES, MAPS, hdf5, label_map, open_pairs, prepared_pairs, write_pairs
from source_files import SETTINGS, open_given

from trainkit.data.account import Kind
from trainkit.data.loading.conditioning_images import ConditioningImages
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation.export import export_hdf5
from trainkit.data.preparation.prepare import dataset_fingerprint
from trainkit.errors import UserError

IDS = np.stack([label_map(number) for number in range(8)])  # of write_pairs, in the order of its names below
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # a/00, a/02, ..., b/01, ...


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs")


@pytest.fixture
def wanted(pairs, tmp_path):
    """The maps that the files give."""
    return prepared_pairs(pairs[0], tmp_path / "wanted", conditioning_data_dir=str(pairs[1]), **MAPS)[1]


@pytest.mark.parametrize(
    "ids",
    [IDS[ORDER], IDS[ORDER][:, None], IDS[ORDER][..., None], IDS[ORDER].astype(np.int64), IDS[ORDER].astype(np.int16)],
    ids=["NHW", "NCHW", "NHWC", "int64", "int16"],
)
def test_label_maps_of_every_layout_and_type(pairs, wanted, tmp_path, ids):
    path = hdf5(*pairs, tmp_path / "p.h5", conditioning_images=ids)
    images, maps, _ = prepared_pairs(path, tmp_path / "out", **MAPS)
    assert np.array_equal(maps, wanted) and images.pairs.classes == CLASSES


@pytest.mark.parametrize("name", ["conditioning_image", "group/conditioning_images", "masks"])
def test_names_of_the_array(pairs, wanted, tmp_path, name):
    flags = {"conditioning_image_column": name} if name == "masks" else {}
    path = hdf5(*pairs, tmp_path / "p.h5", name)
    assert np.array_equal(prepared_pairs(path, tmp_path / "out", **flags, **MAPS)[1], wanted)
    aliases = open_pairs(path, **flags).account.examples.get(Kind.COLUMN_ALIAS, [])
    assert aliases == (["group/conditioning_images as conditioning images"] if "/" in name else [])


def test_pictures_as_numbers_from_0_to_1_and_of_another_size(pairs, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (8, 40, 56, 3), dtype=np.uint8)
    given = {"bytes": pictures, "floats": pictures / 255, "first": pictures.transpose(0, 3, 1, 2)}
    found = {
        name: prepared_pairs(hdf5(*pairs, tmp_path / f"{name}.h5", conditioning_images=array), tmp_path / name)[1]
        for name, array in given.items()
    }
    assert found["bytes"].shape == (8, 16, 16, 3) and np.abs(np.diff(found["bytes"][..., 0].astype(int))).max() > 9
    assert all(np.array_equal(found["bytes"], other) for other in found.values())


def test_other_scripts_do_not_take_them_for_the_images(pairs, tmp_path):
    path = hdf5(*pairs, tmp_path / "p.h5")
    with h5py.File(path, "a") as file:
        file.move("data", "photos_by_me")
    source = open_given(path)
    assert source.pairs is None and source.arrays.image == "photos_by_me"
    assert source.account.examples[Kind.COLUMN_NOT_USED] == ["conditioning_images"]
    with h5py.File(tmp_path / "alone.h5", "w") as file:
        file["conditioning_images"] = IDS[..., None]
    alone = open_pairs(tmp_path / "alone.h5")
    assert alone.pairs is None and alone.arrays.image == "conditioning_images"


def test_files_without_pairs_keep_their_identity(pairs, tmp_path):
    path = hdf5(*pairs, tmp_path / "p.h5")
    source = open_given(path)
    assert source.arrays.identity == (
        "Arrays(image='data', layout='NHWC', label=None, text=None, vector=None, is_one_hot=False)"
    )
    kinds = [source, open_pairs(path), open_pairs(path, **MAPS)]
    assert len({dataset_fingerprint(each, SETTINGS) for each in kinds}) == 3


def test_one_bad_conditioning_image_costs_its_own_row(pairs, tmp_path):
    pictures = np.zeros((200, 20, 28, 3), np.float32)
    pictures[7, 0, 0, 0] = np.nan  # none of the rows that are looked at beforehand
    images = np.zeros((200, 20, 28, 3), np.uint8)
    path = hdf5(*pairs, tmp_path / "p.h5", data=images, conditioning_images=pictures)
    _, found, preparation = prepared_pairs(path, tmp_path / "out")
    assert preparation["rejected"] == {"bad_conditioning_image": 1} and len(found) == 199
    line = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert line["source"] == "row 7" and "its conditioning image: out_of_range" in line["message"]


@pytest.mark.parametrize("flags", [MAPS, {}, {"conditioning_image_mode": "L"}])
def test_there_and_back(pairs, tmp_path, flags):
    given = {"conditioning_data_dir": str(pairs[1])} | flags
    _, wanted, _ = prepared_pairs(pairs[0], tmp_path / "out", **given)
    export_hdf5(PreparedImages(tmp_path / "out"), tmp_path / "x.h5")
    _, found, _ = prepared_pairs(tmp_path / "x.h5", tmp_path / "back", **flags)
    assert np.array_equal(found, wanted)
    back = PreparedImages(tmp_path / "back")
    assert np.array_equal(ConditioningImages(back).shown(np.arange(8)).shape[:3], (8, 16, 16))


@pytest.mark.parametrize(
    ("arrays", "flags", "message"),
    [
        ({"conditioning_images": IDS[:5]}, MAPS, "p.h5: `conditioning_images` has 5 rows for 8 images"),
        ({"conditioning_images": IDS[:, :3, :3]}, MAPS, "conditioning_image_size"),
        ({"conditioning_images": IDS + 2}, MAPS, "--conditioning_classes 4: row [0-7]: .* it holds the id [45]"),
        ({"conditioning_images": IDS[..., None].repeat(3, 3)}, MAPS, "row 0: .* it has 3 channels"),
        ({"conditioning_images": IDS / 3}, MAPS, "is float64; store the ids of label maps as whole numbers"),
        (
            {"conditioning_images": IDS * 50.0},
            {},
            r"_images` holds floats from 0 to 150, wanted \[0, 1\]",
        ),
        ({"conditioning_images": IDS.astype(np.int64)}, {}, "`conditioning_images` is int64; store uint8, or floats"),
        ({"masks": IDS[..., None].repeat(2, 3)}, {"conditioning_image_column": "masks"}, "`masks` .* is not .N, H, W"),
        (
            {},
            {"conditioning_image_column": "x"},
            "--conditioning_image_column x is not in .*p.h5; it has cond",
        ),
    ],
)
def test_one_line_error_that_names_the_file(pairs, tmp_path, arrays, flags, message):
    path = hdf5(*pairs, tmp_path / "p.h5", **arrays)
    with pytest.raises(UserError, match=message) as error:
        prepared_pairs(path, tmp_path / "out", **flags)
    assert "\n" not in str(error.value)
