"""The account of a source: every file that was found is an image, is used, or is named as not read."""

import io
import json
import os

import numpy as np
import pytest
from source_files import open_given, png, prepared, write_zip

from trainkit.data.account import Account, Kind
from trainkit.errors import UserError


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def given_files(tmp_path, files, packed):
    if packed:
        return write_zip(tmp_path / "in.zip", files)
    for name, content in files:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "in"


FILES = [
    ("a.png", png(1)), ("a.txt", b"one"), ("a.xml", b"<objects/>"), ("b.jpg", png(2)), ("b.caption", b"two"),
    ("c.png", png(3)), ("c.txt", b"three"), ("c.webp", png(4)), ("raw.nef", b"raw"), ("table.csv", b"a,b"),
    (".hidden.png", png()), ("notes.pdf", b""), ("lonely.txt", b"alone"), ("damaged.png", b"no image"),
]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_every_file_is_accounted_for(tmp_path, packed):
    given = given_files(tmp_path, FILES, packed)
    found = prepared(given, tmp_path / "out")
    assert found.texts == ["one", "two", "three", "three"] and found.rejected == {"not_an_image": 1}
    content = json.loads((tmp_path / "out/preparation.json").read_text(encoding="utf-8"))
    account = Account.from_json(content["account"], content["ignored"])
    assert account.counts[Kind.FILES_FOUND] == len(FILES) and account.difference == 0
    uses = "3 caption files used" if packed else "4 caption files used"
    assert account.sum_line().startswith("14 files found") and "not accounted" not in account.sum_line()
    assert uses in account.sum_line() and uses not in account.lines()
    assert account.examples[Kind.SIDECAR_NOT_READ] == ["a.xml"]
    assert account.examples[Kind.FOREIGN_IMAGE] == ["raw.nef"]
    assert account.examples[Kind.TABLE_NOT_READ] == ["table.csv"]
    assert account.examples[Kind.HIDDEN] == [".hidden.png"]
    assert content["ignored"] == {".csv": 1, ".nef": 1, ".pdf": 1, ".txt": 1, ".xml": 1}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_metadata_with_rows_without_images_adds_up(tmp_path, packed):
    rows = [{"file_name": "a.png", "text": "from the row"}, {"file_name": "gone.png", "text": "x"}]
    table = "\n".join(map(json.dumps, rows)).encode()
    files = [("a.png", png(1)), ("a.txt", b"from the file"), ("b.png", png(2)), ("metadata.jsonl", table)]
    given = given_files(tmp_path, files, packed)
    assert prepared(given, tmp_path / "out").texts == ["from the row"]
    counts = open_given(given).account.counts
    assert counts[Kind.SIDECAR_NOT_USED] == 1
    assert counts[Kind.EXTRA_ITEMS] == counts[Kind.METADATA_FILES] == counts[Kind.IMAGE_WITHOUT_ROW] == 1


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_arrays_that_are_not_vectors_are_not_used(tmp_path, packed):
    """A segmentation mask or a latent next to each image does not reject the image."""
    files = [(f"{name}.{kind}", content) for name in "ab" for kind, content in
             (("png", png()), ("npy", npy(np.zeros((4, 4)))))]  # fmt: skip
    given = given_files(tmp_path, files, packed)
    found = prepared(given, tmp_path / "out")
    assert found.names == ["a.png", "b.png"] and not found.rejected
    source = open_given(given)
    assert source.vector_length is None and source.account.counts[Kind.VECTOR_NOT_USED] == 2


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("folders, noted", [
    (["10_cat", "3_dog"], ["10_cat", "3_dog"]), (["5_cat"], ["5_cat"]),
    (["1_cat", "2_dog"], []), (["10_cat", "dog"], []), (["001_cat", "007_dog"], []),
])  # fmt: skip
def test_repeats_in_the_names_of_folders_are_said_to_be_ignored(tmp_path, packed, folders, noted):
    source = open_given(given_files(tmp_path, [(f"{name}/1.png", png()) for name in folders], packed))
    assert source.account.examples.get(Kind.REPEATS, []) == noted
    assert any("repeats are not read" in line for line in source.account.lines()) is bool(noted)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_why_folders_are_not_classes(tmp_path, packed):
    files = [(name, png()) for name in ("cat/1.png", "cat/old/2.png", "dog/3.png", "loose.png")]
    given = given_files(tmp_path, files, packed)
    source = open_given(given)
    assert source.label_names is None
    assert source.account.examples[Kind.NO_CLASSES] == [
        "cat/1.png and cat/old/2.png are not equally deep; --label_from top_folder uses the folders at the top"
    ]
    found = prepared(given, tmp_path / "out", label_from="top_folder")
    assert found.label_names == ["cat", "dog"]
    assert dict(zip(found.names, found.labels, strict=True)) == {
        "cat/1.png": 0, "cat/old/2.png": 0, "dog/3.png": 1, "loose.png": -1,
    }  # fmt: skip
    account = open_given(given, label_from="top_folder").account
    assert account.examples[Kind.NO_CLASS_FOLDER] == ["loose.png"] and account.counts[Kind.NO_CLASS_FOLDER] == 1


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_the_folder_at_the_top_is_looked_for_in_the_split(tmp_path, packed):
    names = ("train/cat/1.png", "train/cat/old/2.png", "train/dog/3.png", "train/loose.png", "test/cat/4.png")
    given = given_files(tmp_path, [(name, png(number)) for number, name in enumerate(names)], packed)
    found = prepared(given, tmp_path / "out", label_from="top_folder")
    assert dict(zip(found.names, found.labels, strict=True)) == {
        "train/cat/1.png": 0, "train/cat/old/2.png": 0, "train/dog/3.png": 1, "train/loose.png": -1,
    }  # fmt: skip
    account = open_given(given, label_from="top_folder").account
    assert account.examples[Kind.NO_CLASS_FOLDER] == ["train/loose.png"]


def test_a_class_may_be_called_like_a_split(tmp_path):
    given_files(tmp_path, [(name, png()) for name in ("train/old/1.png", "car/2.png", "bus/3.png")], packed=False)
    source = open_given(tmp_path / "in", label_from="top_folder", dataset_split="all")
    assert [entry.label for entry in source.entries] == ["bus", "car", "train"]


@pytest.mark.parametrize("flag", ["caption_column", "image_column", "vector_column"])
def test_a_column_of_a_folder_without_a_table_is_refused(tmp_path, flag):
    given = given_files(tmp_path, [("1.png", png())], packed=False)
    with pytest.raises(UserError, match=f"--{flag} foo is a column of a table, and .* has no metadata.csv"):
        open_given(given, **{flag: "foo"})
    assert len(open_given(given, image_column="image").entries) == 1


def test_one_folder_at_the_top_is_no_class(tmp_path):
    given_files(tmp_path, [(name, png()) for name in ("photos/cat/1.png", "photos/dog/2.png")], packed=False)
    source = open_given(tmp_path / "in", label_from="top_folder")
    assert source.label_names is None
    assert source.account.examples[Kind.NO_CLASSES] == ["--label_from top_folder: all images are in photos"]


def test_linked_folders_that_are_read_elsewhere_are_named(tmp_path):
    given_files(tmp_path, [("a/1.png", png()), ("b/2.png", png(1))], packed=False)
    os.symlink(tmp_path / "in/a", tmp_path / "in/again")
    os.symlink(tmp_path / "in", tmp_path / "in/b/up")
    found = prepared(tmp_path / "in", tmp_path / "out")
    assert found.names == ["a/1.png", "b/2.png"] and found.label_names == ["a", "b"]
    assert open_given(tmp_path / "in").account.examples[Kind.LINK_NOT_FOLLOWED] == ["again", "b/up"]


def test_only_foreign_images_stop_with_the_fix(tmp_path):
    given_files(tmp_path, [("1.cr2", b"raw"), ("2.svg", b"<svg/>")], packed=False)
    with pytest.raises(UserError, match=r"holds no image file .*cr2.*; convert the images to JPEG or PNG"):
        open_given(tmp_path / "in")


def test_further_images_of_a_sample_are_named(tmp_path):
    files = [("0.jpg", png()), ("0.mask.png", png(1)), ("0.json", b'{"caption": "a cat"}')]
    given = write_zip(tmp_path / "samples.zip", files)
    found = prepared(given, tmp_path / "out")
    assert found.names == ["0.jpg"] and found.texts == ["a cat"]
    account = open_given(given).account
    assert account.examples[Kind.SAMPLE_PART] == ["0.mask.png"] and account.counts[Kind.LABEL_FILES] == 1


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_images_without_a_caption_are_named_where_others_have_one(tmp_path, packed):
    given = given_files(tmp_path, [("a.png", png()), ("a.txt", b"one"), ("b.png", png(1))], packed)
    assert prepared(given, tmp_path / "out").texts == ["one", ""]
    content = json.loads((tmp_path / "out/preparation.json").read_text(encoding="utf-8"))
    assert content["account"][Kind.NO_CAPTION.words()] == {"count": 1, "examples": ["b.png"]}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_images_without_a_class_are_named_where_others_have_one(tmp_path, packed):
    table = b",file_name,label\n0,a.png,x\n1,b.png,\n"  # as pandas writes it, with its index
    given = given_files(tmp_path, [("a.png", png()), ("b.png", png(1)), ("metadata.csv", table)], packed)
    prepared(given, tmp_path / "out")
    content = json.loads((tmp_path / "out/preparation.json").read_text(encoding="utf-8"))
    assert content["account"][Kind.NO_CLASS.words()] == {"count": 1, "examples": ["b.png"]}
    assert content["account"][Kind.COLUMN_NOT_USED.words()]["examples"] == ["a column without a name of metadata.csv"]


def test_a_metadata_file_next_to_archives_is_counted(tmp_path):
    write_zip(tmp_path / "a.zip", [("1.png", png())])
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,one\n", encoding="utf-8")
    assert prepared(tmp_path, tmp_path / "out").texts == ["one"]
    counts = open_given(tmp_path).account.counts
    assert counts[Kind.FILES_FOUND] == 2 and counts[Kind.METADATA_FILES] == 1
