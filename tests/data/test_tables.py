"""Parquet files, and vectors and labels in the tables of the `datasets` library."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from source_files import assert_same, files_of, open_given, png, prepared, write_photos

from trainkit.data.sources import records
from trainkit.errors import UserError


def table_of(folder) -> pa.Table:
    """The folder's photos by row."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".webp"))
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [path.parent.name for path in paths],
        "caption": [path.with_suffix(".txt").read_text().strip() for path in paths],
        "vector": [np.load(path.with_suffix(".npy")).tolist() for path in paths],
    }
    return pa.table(columns)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


@pytest.mark.parametrize("row_group_size", [1, 7, 1000])
def test_rows_give_what_the_files_gave(photos, tmp_path, row_group_size, monkeypatch):
    monkeypatch.setattr(records, "UNIT_ITEMS", 8)
    pq.write_table(table_of(photos), tmp_path / "t.parquet", row_group_size=row_group_size)
    wanted = prepared(photos, tmp_path / "folder")
    found = prepared(tmp_path / "t.parquet", tmp_path / "out")
    assert_same(found, wanted, with_names=False)
    assert found.names[3] == "row 3"
    prepared(tmp_path / "t.parquet", tmp_path / "two", num_proc=2)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "out")


def test_a_folder_of_files_and_what_datasets_wrote(photos, tmp_path):
    table = table_of(photos)
    (tmp_path / "set/data").mkdir(parents=True)
    columns = table.to_pydict() | {"label": [int(label == "b") for label in table.column("label").to_pylist()]}
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]), caption=datasets.Value("string"),
        vector=datasets.List(datasets.Value("float64"), length=4),
    )  # fmt: skip
    whole = datasets.Dataset.from_dict(columns, features=features)
    for number, rows in enumerate([range(12), range(12, 30)]):
        whole.select(rows).to_parquet(tmp_path / f"set/data/train-{number}.parquet")
    wanted = prepared(photos, tmp_path / "folder")
    found = prepared(tmp_path / "set", tmp_path / "out")
    assert_same(found, wanted, with_names=False)
    assert found.names[12] == "train-1.parquet row 0"
    whole.save_to_disk(tmp_path / "saved")
    assert_same(prepared(tmp_path / "saved", tmp_path / "saved-out"), wanted, with_names=False)


def test_a_saved_dataset_with_labels_as_words(photos, tmp_path):
    pq.write_table(table_of(photos), tmp_path / "t.parquet")
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "t.parquet"), cache_dir=str(tmp_path / "cache"))
    loaded.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    wanted = prepared(photos, tmp_path / "folder")
    assert_same(prepared(tmp_path / "saved", tmp_path / "out"), wanted, with_names=False)


def test_null_rows_and_odd_vectors_are_rejected(tmp_path):
    content = [png(1), None, png(2), b"", png(3), png(4), png(5)]
    vectors = [[1.0, 2.0], [1.0, 2.0], None, [1.0, 2.0], [1.0], [float("nan"), 1.0], [3.0, 4.0]]
    table = pa.table({"jpg": content, "label": pa.array([30, 4, 4, None, 4, 4, None]), "vector": vectors})
    pq.write_table(table, tmp_path / "t.parquet")
    found = prepared(tmp_path / "t.parquet", tmp_path / "out")
    assert found.names == ["row 0", "row 6"] and found.vectors.tolist() == [[1, 2], [3, 4]]
    assert found.rejected == {"bad_vector": 3, "empty": 1, "missing": 1}
    assert found.label_names == ["4", "30"] and found.labels == [1, -1]


def test_another_column_of_vectors(tmp_path):
    table = pa.table({"image": [png(1)] * 3, "embedding": pa.array([[1, 2]] * 3, pa.list_(pa.int32(), 2))})
    pq.write_table(table, tmp_path / "t.parquet")
    assert prepared(tmp_path / "t.parquet", tmp_path / "out").vectors.shape == (3, 0)
    found = prepared(tmp_path / "t.parquet", tmp_path / "out", vector_column="embedding")
    assert found.vectors.tolist() == [[1, 2]] * 3
    with pytest.raises(UserError, match="--vector_column embeding is not a column of lists of numbers"):
        open_given(tmp_path / "t.parquet", vector_column="embeding")


def test_a_damaged_row_group_costs_its_rows(tmp_path):
    generator = np.random.default_rng(0)
    content = []
    for _ in range(40):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "x.png")
        content.append((tmp_path / "x.png").read_bytes())
    table = pa.table({"image": content})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=10, use_dictionary=False, compression="snappy")
    group = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(2).column(0)
    damaged = bytearray((tmp_path / "t.parquet").read_bytes())
    damaged[group.data_page_offset : group.data_page_offset + 60] = b"\xff" * 60
    (tmp_path / "t.parquet").write_bytes(damaged)
    found = prepared(tmp_path / "t.parquet", tmp_path / "out")
    assert found.rejected == {"corrupt": 10} and len(found.names) == 30


def test_user_errors(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not much")
    with pytest.raises(UserError, match="bad.parquet is not a whole Parquet file"):
        open_given(tmp_path / "bad.parquet")
    pq.write_table(pa.table({"number": [1], "word": ["x"]}), tmp_path / "numbers.parquet")
    with pytest.raises(UserError, match="has no image column .bytes, or paths .*; it has number, word"):
        open_given(tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="hold no row"):
        open_given(tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="has other columns or classes"):
        (tmp_path / "mixed").mkdir()
        pq.write_table(pa.table({"image": [png()]}), tmp_path / "mixed/0.parquet")
        pq.write_table(pa.table({"img": [png()]}), tmp_path / "mixed/1.parquet")
        open_given(tmp_path / "mixed")
    with pytest.raises(UserError, match="holds parquet and zip files; give one kind"):
        (tmp_path / "mixed/2.zip").write_bytes(b"")
        open_given(tmp_path / "mixed")
