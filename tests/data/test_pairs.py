"""Pairs: where conditioning images come from, what is counted, what is rejected, and what is refused."""

import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from pair_helpers import (
    CLASSES,
    MAPS,
    given_as,
    label_map,
    open_pairs,
    prepared_pairs,
    table_of,
    webdataset,
    with_metadata,
    write_pairs,
)
from PIL import Image
from source_files import SETTINGS, files_of, open_given, write_zip

from trainkit.data.account import Account, Kind
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.pairing import PairSettings
from trainkit.data.preparation.prepare import dataset_fingerprint, prepare
from trainkit.errors import UserError


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs")


WAYS = [
    "folder", "metadata.jsonl", "metadata.csv", "named column", "zip", "beside zip", "webdataset", "parquet",
    "paths in parquet", "saved", "hdf5",
]  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_pairs_are_the_same_in_every_form(pairs, tmp_path, how):
    given, flags = given_as(how, *pairs, tmp_path / "given")
    images, maps, preparation = prepared_pairs(given, tmp_path / "out", **flags, **MAPS)
    assert len(images) == 8 and not preparation["rejected"]
    assert images.pairs == PairSettings("L", CLASSES) and images.settings == SETTINGS
    red = images.gather(np.arange(8))[..., 0]
    assert np.array_equal(np.unique(maps), np.arange(CLASSES))
    assert np.mean((maps[..., 0] * 60.0 - red) == 0) > 0.8, "the ids are at the place of what they name"
    assert preparation["columns"].count("conditioning_image") == 1


def test_pairs_may_be_left_out(pairs, tmp_path):
    for how in ("metadata.jsonl", "parquet", "webdataset", "hdf5"):
        given, _ = given_as(how, *pairs, tmp_path / how)
        left_out = open_pairs(given, conditioning_image_column="none")
        assert left_out.pairs is None and len(left_out) == 8
        assert dataset_fingerprint(left_out, SETTINGS) == dataset_fingerprint(open_given(given), SETTINGS)


@pytest.mark.parametrize("how", ["metadata.jsonl", "zip", "beside zip"])
def test_conditioning_images_in_the_folder_are_used_and_not_trained_on(pairs, tmp_path, how):
    given, _ = given_as(how, *pairs, tmp_path / "given")
    counts = open_pairs(given, **MAPS).account.counts
    assert counts[Kind.CONDITION_FILES] == 8 and Kind.IMAGE_WITHOUT_ROW not in counts
    alone = open_given(given)  # a script that uses no pairs
    assert alone.pairs is None and len(alone) == 8 and alone.account.counts[Kind.IMAGE_WITHOUT_ROW] == 8


def test_the_second_image_of_a_sample_is_not_trained_on(pairs, tmp_path):
    source = open_given(webdataset(*pairs, tmp_path / "p.tar"))
    assert (
        len(source) == 8 and source.account.counts[Kind.SAMPLE_PART] == 8 and source.account.difference == 8
    )  # the images


def test_faults_of_conditioning_images_are_rejected_by_name_and_counted(pairs, tmp_path):
    images, maps = pairs
    (maps / "a" / "00.png").unlink()
    (maps / "a" / "02.png").write_bytes((maps / "a" / "02.png").read_bytes()[:60])
    Image.fromarray(label_map(1, 20, 27)).save(maps / "b" / "01.png")
    (maps / "b" / "03.png").rename(maps / "b" / "03.webp")  # the content decides
    (maps / "b" / "lonely.png").write_bytes(b"")
    (maps / "metadata.csv").write_text("file_name\n")
    (maps / "b" / "05.txt").write_text("a caption")
    flags = {"conditioning_data_dir": str(maps)} | MAPS
    found, _, preparation = prepared_pairs(images, tmp_path / "out", **flags)
    faults = {"no_conditioning_image": 1, "bad_conditioning_image": 1, "conditioning_image_size": 1}
    assert preparation["rejected"] == dict(sorted(faults.items())) and len(found) == 5
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    messages = {line["source"]: line["message"] for line in lines}
    assert "01.png: it is 27x20 pixels and its image 28x20" in messages["b/01.png"]
    assert "02.png: truncated" in messages["a/02.png"] or "02.png: corrupt" in messages["a/02.png"]
    lines = Account.from_json(preparation["account"], preparation["ignored"]).lines()
    assert "7 conditioning images used + 1 conditioning image without an image, not used" in lines[0]
    assert any("lonely.png" in line for line in lines)


def test_a_member_that_metadata_pairs_and_that_is_missing_or_broken(pairs, tmp_path):
    folder = with_metadata(*pairs, tmp_path / "in")
    (folder / "maps" / "a" / "00.png").unlink()
    (folder / "maps" / "a" / "02.png").write_bytes(b"no image")
    for given in (folder, write_zip(tmp_path / "p.zip", files_of(folder))):
        _, _, preparation = prepared_pairs(given, tmp_path / "out", **MAPS)
        assert preparation["rejected"] == {"bad_conditioning_image": 1, "no_conditioning_image": 1}


def test_the_suffix_of_the_image_decides_among_several(tmp_path):
    for name, value in (("a.png", 1), ("a.b.png", 2), ("a-c.png", 3)):
        for folder in ("images", "maps"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("L", (16, 16), value).save(tmp_path / folder / name)
    Image.new("L", (16, 16)).save(tmp_path / "maps" / "a.bmp")
    Image.new("L", (16, 16)).save(tmp_path / "maps" / "a.b.gif")
    flags = {"conditioning_data_dir": str(tmp_path / "maps")} | MAPS
    images, maps, preparation = prepared_pairs(tmp_path / "images", tmp_path / "out", **flags)
    assert np.array_equal(maps[:, 0, 0, 0], images.gather(np.arange(3))[:, 0, 0, 0])
    assert preparation["account"]["conditioning image without an image, not used"]["count"] == 2


def test_the_pairing_is_part_of_the_identity_and_data_without_pairs_keeps_its_own(tmp_path):
    """The constants are those of the version before there were pairs."""
    for name in ("1.ppm", "2.ppm"):
        for folder in ("images", "maps"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(b"P6 2 2 255\n" + bytes(12))
            os.utime(tmp_path / folder / name, (10**9, 10**9))
    plain, flags = open_given(tmp_path / "images"), {"conditioning_data_dir": str(tmp_path / "maps")}
    assert dataset_fingerprint(plain, SETTINGS) == "5004ab7c1ebea5c9"
    assert plain.units()[0].identity == "4c3c3228ecfdd099"
    prepare(plain, SETTINGS, tmp_path / "out", 1, False)
    held = PreparedImages(tmp_path / "out")
    assert held.preparation["shards"][0]["filename"] == "data-cfdb96d89edaa507.arrow" and held.pairs is None
    assert not {"pairs", "conditioning_image"} & {*held.preparation, *held.preparation["columns"]}
    assert dataset_fingerprint(open_pairs(tmp_path / "images"), SETTINGS) == dataset_fingerprint(plain, SETTINGS)

    def fingerprint(**more):
        return dataset_fingerprint(open_pairs(tmp_path / "images", **flags, **more), SETTINGS)

    kinds = [{}, {"conditioning_image_mode": "L"}, MAPS, {"conditioning_classes": 5}]
    found = [dataset_fingerprint(plain, SETTINGS), *(fingerprint(**kind) for kind in kinds)]
    os.utime(tmp_path / "maps" / "2.ppm", (10**9, 10**9 + 1))
    assert len({*found, fingerprint()}) == 6


def test_a_dataset_with_other_pairs_is_not_replaced(pairs, tmp_path):
    flags = {"conditioning_data_dir": str(pairs[1])}
    prepared_pairs(pairs[0], tmp_path / "out", **flags, **MAPS)
    for other, words in (({}, "no conditioning images"), (flags, "RGB pictures as conditioning images")):
        with pytest.raises(UserError, match=f"label maps of 4 classes as conditioning images, now with {words}"):
            prepare(open_pairs(pairs[0], **other), SETTINGS, tmp_path / "out", 1, False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"conditioning_data_dir": "nowhere"}, "--conditioning_data_dir nowhere is not a folder"),
        ({"conditioning_data_dir": "empty"}, "empty holds no conditioning image of any image: .* no image file"),
        ({"conditioning_data_dir": "others"}, "wanted is a/00.png with any image suffix, and there is x.png"),
        ({"conditioning_data_dir": "pairs/images/a"}, "images/a is inside --train_data_dir pairs/images"),
        ({"conditioning_classes": 4}, "--conditioning_classes 4 is for conditioning images, and .* has none: give "),
        ({"conditioning_image_column": "x"}, "--conditioning_image_column x is a column of a table, and .* has no"),
        (
            {"conditioning_data_dir": "pairs/maps", "conditioning_image_column": "x"},
            "--conditioning_data_dir pairs/maps and --conditioning_image_column x both name",
        ),
        (
            {"conditioning_data_dir": "pairs/maps", "conditioning_image_mode": "L", "conditioning_classes": 4},
            "--conditioning_image_mode L is for pictures, --conditioning_classes 4 for label maps",
        ),
        (
            {"conditioning_data_dir": "pairs/maps", "conditioning_image_mode": "RGBA", "storage": "jpeg"},
            "--storage jpeg stores no transparency",
        ),
        ({"train_data_dir": "p.zip", "conditioning_data_dir": "pairs/maps"}, "is for a folder of images, and .*p.zip"),
        (
            {"train_data_dir": "t.parquet", "conditioning_image_column": "x"},
            "column x is not in .*t.parquet; it has im",
        ),
        (
            {"train_data_dir": "m", "conditioning_image_column": "x"},
            "--conditioning_image_column x is not in metadata",
        ),
        ({"train_data_dir": "out"}, "metadata names the conditioning image ../m/1.png, which is outside"),
        (
            {"train_data_dir": "lost"},
            "none of the conditioning images that metadata names is there .the first is 2.png",
        ),
    ],
)
def test_one_line_error(pairs, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "others", "m", "out", "lost"):
        (tmp_path / folder).mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "others" / "x.png")
    for folder, condition in (("m", "2.png"), ("out", "../m/1.png"), ("lost", "2.png")):
        Image.new("L", (8, 8)).save(tmp_path / folder / "1.png")
        row = {"file_name": "1.png", "conditioning_file_name": condition}
        (tmp_path / folder / "metadata.jsonl").write_text(json.dumps(row))
    write_zip(tmp_path / "p.zip", files_of(pairs[0]))
    pq.write_table(table_of(*pairs), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=message) as error:
        open_pairs(
            **{"given": flags.get("train_data_dir", "pairs/images")},
            **{k: v for k, v in flags.items() if k != "train_data_dir"},
        )
    assert "\n" not in str(error.value)
