"""Metadata files of other programs: which column names the images, and what the rows say about them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import open_given, png, prepared

from trainkit.data.account import Account, Kind
from trainkit.data.sources.records import sorted_labels
from trainkit.data.sources.texts import NotAClass, class_name
from trainkit.errors import UserError


def write(root, content, *names, metadata="metadata.json"):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    if isinstance(content, list | dict):
        content = json.dumps(content)
    (root / metadata).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.mark.parametrize(
    "column", ["image_id", "id", "key", "name", "image_file_name", "photo_file_name", "Image Name"]
)
def test_the_column_that_names_the_images(tmp_path, column):
    write(tmp_path, [{column: "1.png", "text": "one"}, {column: "2.png", "text": "two"}], "1.png", "2.png")
    assert prepared(tmp_path, tmp_path / "out").texts == ["one", "two"]
    assert f"{column} as file_name in metadata.json" in open_given(tmp_path).account.examples[Kind.COLUMN_ALIAS]


def test_a_file_name_comes_before_an_id_and_numbers_are_names(tmp_path):
    write(tmp_path, [{"id": "x", "cover_file_name": "1.png"}], "1.png")
    assert len(open_given(tmp_path)) == 1
    write(tmp_path, [{"id": 1, "text": "one"}], "1.png")
    assert prepared(tmp_path, tmp_path / "out").texts == ["one"]


def test_of_several_columns_of_images_one_has_to_be_named(tmp_path):
    rows = [{"left_file_name": "1.png", "right_file_name": "2.png", "text": "one"}]
    write(tmp_path, rows, "1.png", "2.png")
    with pytest.raises(UserError, match=r"several images per row \(left_file_name, right_file_name\).*--image_column"):
        open_given(tmp_path)
    assert prepared(tmp_path, tmp_path / "out", image_column="right_file_name").names == ["2.png"]


def test_columns_of_conditioning_images_are_named(tmp_path):
    rows = [{"file_name": "1.png", "conditioning_image": "edges/1.png", "text": "one"}]
    source = open_given(write(tmp_path, rows, "1.png"))
    assert source.account.examples[Kind.COLUMN_NOT_USED] == [
        "conditioning_image of metadata.json (for --condition image: --conditioning_image_column conditioning_image)"
    ]


def test_images_that_were_converted_after_the_table_was_written(tmp_path):
    rows = [{"file_name": "1.jpg", "text": "one"}, {"file_name": "2.tiff", "text": "two"}]
    write(tmp_path, rows, "1.png", "2.png")
    assert prepared(tmp_path, tmp_path / "out").texts == ["one", "two"]
    assert open_given(tmp_path).account.examples[Kind.MATCHED_NAME] == ["1.jpg -> 1.png", "2.tiff -> 2.png"]


def test_an_exact_name_comes_before_a_converted_one(tmp_path):
    rows = [{"file_name": "x/1.png", "text": "exact"}, {"file_name": "x/1.jpg", "text": "gone"}]
    write(tmp_path, rows, "1.png", "2.png")
    source = open_given(tmp_path)
    assert source.account.examples[Kind.MATCHED_NAME] == ["x/1.png -> 1.png"]
    assert source.account.examples[Kind.ROW_WITHOUT_IMAGE] == ["metadata.json line 2: x/1.jpg"]


def test_images_as_datasets_writes_them_to_a_table(tmp_path):
    table = pa.table({"image": [{"bytes": None, "path": "1.png"}], "text": ["one"]})
    write(tmp_path, b"", "1.png", metadata="unused.pdf")
    pq.write_table(table, tmp_path / "metadata.parquet")
    assert prepared(tmp_path, tmp_path / "out").texts == ["one"]


def test_the_labels_of_stylegan_as_an_object(tmp_path):
    write(tmp_path, {"labels": {"1.png": 4, "2.png": 2}}, "1.png", "2.png", metadata="dataset.json")
    found = prepared(tmp_path, tmp_path / "out")
    assert found.label_names == ["2", "4"] and found.labels == [1, 0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig", "cp1252"])
def test_tables_in_other_encodings(tmp_path, encoding):
    write(tmp_path, "file_name,text\n1.png,ein Café\n".encode(encoding), "1.png", metadata="metadata.csv")
    assert prepared(tmp_path, tmp_path / "out").texts == ["ein Café"]
    assert (Kind.FALLBACK_ENCODING in open_given(tmp_path).account.counts) == (encoding == "cp1252")


def test_a_table_without_rows_is_named(tmp_path):
    source = open_given(write(tmp_path, "file_name,text\n", "1.png", metadata="metadata.csv"))
    assert len(source) == 1 and source.account.examples[Kind.NO_ROWS] == ["metadata.csv"]


@pytest.mark.parametrize("value", ["0.5", "-1.5e3", "inf", "[1, 2]", '{"a": 1}'])
def test_values_of_csv_files_that_are_not_classes(value):
    with pytest.raises(NotAClass):
        class_name(value, is_csv=True)
    assert class_name(value) == value  # elsewhere it is a string on purpose


def test_classes_of_the_same_number_are_named():
    account = Account()
    assert sorted_labels({"7", "07", "8"}, account) == ["07", "7", "8"]
    assert account.examples[Kind.SIMILAR_NAMES] == ["'07' and '7'"]
