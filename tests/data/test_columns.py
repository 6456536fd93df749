"""Tables as other programs write them: which column holds what, and what its values mean. Nothing is lost silently."""

from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from source_files import open_given, png, prepared

from trainkit.data.account import Kind
from trainkit.errors import UserError

PICTURES = [png(i) for i in range(3)]


def write(path, features=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata(datasets.Features(features).arrow_schema.metadata)
    pq.write_table(table, path)
    return path


def saved(path, **columns):
    """The same columns as a folder of `save_to_disk`."""
    datasets.Dataset(pa.table(columns)).save_to_disk(path)
    return path


LABELS = [
    (pa.array(["b", "a", None], pa.string_view()), ["a", "b"], [1, 0, -1]),
    (pa.array([Decimal("2.0"), Decimal("1.0"), None]), ["1", "2"], [1, 0, -1]),
    (pa.array([7, 10, 7], pa.int8()), ["7", "10"], [0, 1, 0]),
    (pa.array(["7", "10", ""]), ["7", "10"], [0, 1, -1]),
    (pa.array([1, None, 1], pa.int32()).dictionary_encode(), ["1"], [0, -1, 0]),
    (pa.array([float("nan"), float("inf"), 1.0]), ["1"], [-1, -1, 0]),
    (pa.array([b"cat", b"dog", b"\xff"]), ["cat", "dog"], [0, 1, -1]),
    (pa.nulls(3), None, None),
]


@pytest.mark.parametrize("column, names, labels", LABELS, ids=lambda value: str(getattr(value, "type", "")))
def test_labels_of_every_type(tmp_path, column, names, labels):
    path = write(tmp_path / "t.parquet", image=PICTURES, label=column)
    found = prepared(path, tmp_path / "out")
    assert found.label_names == names and (names is None or found.labels == labels)


def test_values_that_are_not_classes_are_counted_by_row(tmp_path):
    source = open_given(write(tmp_path / "a.parquet", image=PICTURES, label=[0.5, 0.5, 2.0]))
    assert source.account.counts[Kind.LABEL_NOT_A_CLASS] == 2
    assert source.account.examples[Kind.LABEL_NOT_A_CLASS] == ["label of a.parquet: 0.5 is not a class"]
    source = open_given(write(tmp_path / "b.parquet", image=PICTURES, label=[[1], [2], None]))
    assert "label of b.parquet holds list<" in source.account.examples[Kind.LABEL_NOT_A_CLASS][0]


def test_class_labels_of_datasets(tmp_path):
    names = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])}
    for number, column in enumerate([[0, 1, -1], [0.0, 1.0, None], ["dog", "cat", None]]):
        path = write(tmp_path / f"{number}.parquet", names, image=[{"bytes": p, "path": None} for p in PICTURES],
                     label=pa.array(column))  # fmt: skip
        found = prepared(path, tmp_path / "out")
        assert found.label_names == ["dog", "cat"] and found.labels == [0, 1, -1]
    path = write(tmp_path / "x.parquet", names, image=PICTURES, label=[0, 1, 7])
    source = open_given(path)
    assert prepared(path, tmp_path / "out").labels == [0, 1, -1]
    assert source.reader.read(source.units()[0].items[2]).notes == (Kind.LABEL_NOT_A_CLASS,)


CAPTIONS = [
    pa.array(["one", "", None]),
    pa.array(["one", None, "  "], pa.string_view()),
    pa.array([["one", ""], [], None], pa.list_(pa.string())),
    pa.array([["one"], [None], None], pa.large_list(pa.large_string())),
    pa.array([["one"], [None], ["\n"]], pa.list_(pa.string(), 1)),
    pa.array(["one", None, ""]).dictionary_encode(),
]


@pytest.mark.parametrize("column", CAPTIONS, ids=lambda column: str(column.type))
def test_captions_of_every_type_and_empty_ones_are_counted(tmp_path, column):
    path = write(tmp_path / "t.parquet", image=PICTURES, text=column)
    assert prepared(path, tmp_path / "out").texts == ["one", "", ""]
    source = open_given(path)
    notes = [source.reader.read(item).notes for item in source.units()[0].items]
    assert notes == [(), (Kind.EMPTY_CAPTION,), (Kind.EMPTY_CAPTION,)]


def test_all_captions_of_an_image_are_kept(tmp_path):
    path = write(tmp_path / "coco.parquet", image=PICTURES, captions=[["a", "b"], ["c"], ["d", "e"]])
    assert prepared(path, tmp_path / "out").texts == ["a\nb", "c", "d\ne"]


@pytest.mark.parametrize("name", ["image", "img", "Image", "jpg", "png", "pixel_values", "anything"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_columns_of_bytes(tmp_path, name, kind):
    source = open_given(write(tmp_path / "t.parquet", **{name: pa.array(PICTURES, kind)}))
    assert source.reader.read(source.units()[0].items[1]).image == PICTURES[1]


def test_paths_of_images_start_at_the_table(tmp_path):
    for number in range(3):
        (tmp_path / "in/images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"in/images/{number}.png")
    paths = ["images/0.png", str(tmp_path / "in/images/1.png"), "images/gone.png"]
    tables = [{"file_name": paths}, {"image": paths}, {"image": [{"bytes": None, "path": path} for path in paths]}]
    for number, columns in enumerate(tables):
        path = write(tmp_path / "in/rows.parquet", **columns, label=["a", "b", "a"])
        found = prepared(path, tmp_path / f"out{number}")
        assert found.pixels[:, 0, 0, 0].tolist() == [0, 1] and found.rejected == {"missing": 1}
    first = open_given(tmp_path / "in")
    assert Kind.OTHER_FORMAT not in first.account.counts
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "in/images/0.png")
    assert open_given(write(tmp_path / "in/rows.parquet", file_name=paths)).fingerprint != first.fingerprint


def test_further_images_and_columns_are_named(tmp_path):
    columns = {"conditioning_image": PICTURES, "image": PICTURES[::-1], "width": [1, 2, 3], "prompt_a": ["x"] * 3,
               "prompt_b": ["y"] * 3}  # fmt: skip
    for given in (write(tmp_path / "t.parquet", **columns), saved(tmp_path / "saved", **columns)):
        source = open_given(given)
        assert source.columns == ("image", None, None, None, None)
        assert source.account.counts[Kind.COLUMN_NOT_USED] == 4
        examples = " ".join(source.account.examples[Kind.COLUMN_NOT_USED])
        assert "(images are read from image; or --image_column conditioning_image)" in examples
        assert "(for captions: --caption_column prompt_a)" in examples
        source = open_given(given, image_column="conditioning_image", caption_column="prompt_b")
        assert source.columns == ("conditioning_image", None, "prompt_b", None, None)
    with pytest.raises(UserError, match="--image_column picture is not in .*t.parquet; it has conditioning_image, im"):
        open_given(tmp_path / "t.parquet", image_column="picture")


def test_a_label_column_under_another_name_is_said(tmp_path):
    source = open_given(write(tmp_path / "t.parquet", image=PICTURES, Category=["a", "b", "a"]))
    assert source.label_names == ["a", "b"]
    assert source.account.examples[Kind.COLUMN_ALIAS] == ["Category as label in t.parquet"]


def test_a_column_that_is_empty_in_one_file(tmp_path):
    write(tmp_path / "0.parquet", image=PICTURES, label=pa.nulls(3), text=pa.nulls(3))
    write(tmp_path / "1.parquet", image=PICTURES, label=["b", "a", "b"], text=["x", "y", "z"])
    found = prepared(tmp_path, tmp_path / "out")
    assert found.labels == [-1, -1, -1, 1, 0, 1] and found.texts == ["", "", "", "x", "y", "z"]


def test_saved_datasets_without_types_of_images(tmp_path):
    for number, images in enumerate([PICTURES, [{"bytes": picture, "path": None} for picture in PICTURES]]):
        folder = saved(tmp_path / f"saved{number}", img=images, class_name=["x", "", "y"])
        found = prepared(folder, tmp_path / "out")
        assert found.label_names == ["x", "y"] and found.labels == [0, -1, 1]
        assert np.array_equal(found.pixels[:, 0, 0, 0], [0, 1, 2])


def test_splits_of_saved_datasets(tmp_path):
    parts = {"train": 3, "test": 2, "validation": 1}
    rows = {name: datasets.Dataset(pa.table({"image": PICTURES[:count]})) for name, count in parts.items()}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "all")
    source = open_given(tmp_path / "all")
    assert len(source) == 3 and source.account.counts[Kind.OTHER_SPLIT_ROWS] == 3
    assert source.account.examples[Kind.OTHER_SPLIT_ROWS] == ["test (2)", "validation (1)"]
    assert len(open_given(tmp_path / "all", dataset_split="validation")) == 1
    assert len(open_given(tmp_path / "all", dataset_split="all")) == 6
    rows["train"].save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="--dataset_split test is not in .*one, which holds a single split"):
        open_given(tmp_path / "one", dataset_split="test")
