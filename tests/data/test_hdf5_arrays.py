"""HDF5 files as other programs write them: names of arrays, splits, types of labels and captions."""

import h5py
import numpy as np
import pytest
from source_files import open_given, png, prepared

from trainkit.data.account import Kind
from trainkit.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
TEXT = h5py.string_dtype()


def write(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name.replace("__", "/")] = array
    return path


@pytest.mark.parametrize(
    "images, labels",
    [("x", "y"), ("X", "Y"), ("images", "targets"), ("pixels", "class"), ("group__images", "group__labels")],
)
def test_arrays_under_other_names(tmp_path, images, labels):
    path = write(tmp_path / "x.h5", **{images: PIXELS, labels: [1, 0, 1, 0]}, extra=np.zeros(4))
    found = prepared(path, tmp_path / "out")
    assert np.array_equal(found.pixels, PIXELS) and found.labels == [1, 0, 1, 0]
    account = open_given(path).account
    assert account.examples[Kind.COLUMN_NOT_USED] == ["extra"]
    assert f"{labels.replace('__', '/')} as label" in account.examples[Kind.COLUMN_ALIAS]


@pytest.mark.parametrize(
    "names",
    [("x_train", "y_train", "x_test", "y_test"), ("train__images", "train__labels", "test__images", "test__labels"),
     ("train_set_x", "train_set_y", "test_set_x", "test_set_y")],
)  # fmt: skip
def test_splits_by_the_names_of_arrays_and_groups(tmp_path, names):
    values = (PIXELS[:3], [0, 1, 0], PIXELS[3:], [1])
    path = write(tmp_path / "x.h5", **dict(zip(names, values, strict=True)))
    source = open_given(path)
    assert len(source) == 3 and source.account.examples[Kind.OTHER_SPLIT_ROWS] == ["test (1)"]
    found = prepared(path, tmp_path / "out", dataset_split="test")
    assert np.array_equal(found.pixels, PIXELS[3:]) and found.label_names == ["1"]
    for split in ("all", "validation"):
        with pytest.raises(UserError, match=f"--dataset_split {split} is not in .*x.h5, which has t"):
            open_given(path, dataset_split=split)


LABELS = [
    ([b"cat", b"dog", b"", b"cat"], ["cat", "dog"], [0, 1, -1, 0]),
    (np.array(["cat", "dog", "", "cat"], TEXT), ["cat", "dog"], [0, 1, -1, 0]),
    ([2.0, 1.0, np.nan, 2.0], ["1", "2"], [1, 0, -1, 1]),
    ([[2], [1], [-1], [2]], ["1", "2"], [1, 0, -1, 1]),
    ([True, False, True, True], ["False", "True"], [1, 0, 1, 1]),
    (np.eye(3, dtype=np.float32)[[2, 0, 1, 1]], ["0", "1", "2"], [2, 0, 1, 1]),
    ([[0, 1], [0, 0], [1, 0], [1, 0]], ["0", "1"], [1, -1, 0, 0]),
    ([[1, 1], [0, 0], [1, 0], [1, 0]], None, None),
    ([0.5, 1.5, 0.5, 2.5], None, None),
]


@pytest.mark.parametrize("values, names, labels", LABELS, ids=range(len(LABELS)))
def test_labels_of_every_type(tmp_path, values, names, labels):
    path = write(tmp_path / "x.h5", data=PIXELS, labels=np.asarray(values, getattr(values, "dtype", None)))
    found = prepared(path, tmp_path / "out")
    assert found.label_names == names
    assert names is None or found.labels == labels
    assert (Kind.LABEL_NOT_A_CLASS in open_given(path).account.counts) == (names is None)


def test_names_of_classes_in_an_array(tmp_path):
    path = write(tmp_path / "x.h5", data=PIXELS, labels=[1, 0, 1, 0], list_classes=[b"non-cat", b"cat"])
    found = prepared(path, tmp_path / "out")
    assert found.label_names == ["non-cat", "cat"] and found.labels == [1, 0, 1, 0]
    assert Kind.COLUMN_NOT_USED not in open_given(path).account.counts


def test_captions_of_every_type(tmp_path):
    texts = [
        np.array(["one", "", "zwei Stücke", "two\nlines"], TEXT),
        [text.encode() for text in ("one", "", "zwei Stücke", "two\nlines")],
        np.array([["one", ""], ["", ""], ["zwei Stücke", ""], ["two", "lines"]], TEXT),
    ]
    last = ["two lines", "two lines", "two\nlines"]
    for number, values in enumerate(texts):
        path = write(tmp_path / f"{number}.h5", data=PIXELS, prompts=values)
        assert prepared(path, tmp_path / "out").texts == ["one", "", "zwei Stücke", last[number]]
        source = open_given(path)
        assert [source.reader.read(row).notes for row in (0, 1)] == [(), (Kind.EMPTY_CAPTION,)]
    path = write(tmp_path / "a.h5", data=PIXELS, a=texts[0])
    assert not open_given(path).has_text and open_given(path, caption_column="a").has_text
    with pytest.raises(UserError, match="--caption_column b: .* has no such array; it has a"):
        open_given(path, caption_column="b")


def test_encoded_images(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        images = file.create_dataset("images", (3,), h5py.vlen_dtype(np.uint8))
        for number in range(3):
            images[number] = np.frombuffer(png(number), np.uint8)
    assert prepared(tmp_path / "x.h5", tmp_path / "out").pixels[:, 0, 0, 0].tolist() == [0, 1, 2]
