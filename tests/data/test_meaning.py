"""Metadata, captions and labels as other people write them: read as they are meant, or refused with a line."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import open_given, png, prepared, write_tar, write_zip

from trainkit.data.account import Account, Kind
from trainkit.data.sources.records import sorted_labels
from trainkit.data.sources.texts import NotAClass, caption_text, class_name, decode_text
from trainkit.errors import UserError


def folder(root, *names, metadata=None, metadata_name="metadata.jsonl"):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    if metadata is not None:
        content = metadata if isinstance(metadata, str) else "\n".join(map(json.dumps, metadata))
        (root / metadata_name).parent.mkdir(parents=True, exist_ok=True)
        (root / metadata_name).write_text(content, encoding="utf-8")
    return root


def named(*names, **more):
    return [{"file_name": name, "text": f"about {number}"} | more for number, name in enumerate(names)]


@pytest.mark.parametrize(
    "images, names",
    [
        (("a/1.png", "a/2.png"), ("photos/a/1.png", "photos/a/2.png")),  # the prefix of a folder above
        (("a/1.png", "b/1.png"), ("a\\1.png", "b\\1.png")),
        (("1.JPG.PNG", "2.PNG"), ("1.jpg.png", "2.png")),
        (("a/1.png", "a/2.png"), ("/home/me/a/1.png", "C:\\data\\a\\2.png")),
        (("a/1.png", "b/2.png"), ("1.png", "2.png")),  # no folder at all
        (("Bu\u0308ro.png", "x.png"), ("B\u00fcro.png", "x.png")),
        (("a b.png", "x.png"), ("a%20b.png", "x.png")),
        (("1.png", "2.png"), ("1", "2")),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_names_from_another_machine_are_matched(tmp_path, images, names, packed):
    root = folder(tmp_path / "in", *images, metadata=named(*names))
    if packed:
        files = [(path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(root.rglob("*.*"))]
        root = write_zip(tmp_path / "in.zip", files)
    source = open_given(root)
    found = prepared(root, tmp_path / "out")
    assert dict(zip(found.names, found.texts, strict=True)) == {
        image: f"about {number}" for number, image in enumerate(images)
    }
    assert source.account.counts[Kind.MATCHED_NAME] == sum(a != b for a, b in zip(images, names, strict=True))


def test_a_name_that_fits_two_images_is_not_matched(tmp_path):
    root = folder(tmp_path, "a/1.png", "b/1.png", "c.png", metadata=named("1.png", "c.png"))
    source = open_given(root)
    assert source.account.examples[Kind.ROW_WITHOUT_IMAGE] == ["metadata.jsonl line 1: 1.png"]
    assert source.account.counts[Kind.IMAGE_WITHOUT_ROW] == 2


def test_metadata_that_names_no_image_stops(tmp_path):
    root = folder(tmp_path, "a.png", "b.png", metadata=named("x.png", "y.png"))
    with pytest.raises(UserError, match="names 2 images and none of them is there.*first is x.png.* there is a.png"):
        open_given(root)


def test_metadata_beside_archives(tmp_path):
    folder(tmp_path, metadata=named("1.png", "2.png", "gone.png"))
    write_tar(tmp_path / "a.tar", [("1.png", png(1))])
    write_tar(tmp_path / "b.tar", [("2.png", png(2)), ("3.png", png(3))])
    found = prepared(tmp_path, tmp_path / "out")
    assert found.texts == ["about 0", "about 1"]
    account = open_given(tmp_path).account
    assert account.examples[Kind.IMAGE_WITHOUT_ROW] == ["b/3.png"]
    assert account.examples[Kind.ROW_WITHOUT_IMAGE] == ["metadata.jsonl line 3: gone.png"]


def test_columns_are_found_by_their_meaning_and_named(tmp_path):
    rows = 'FileName; Prompt ;Class;width\n1.png;a cat;7;640\n2.png;"a; dog";07;640\n'
    found = prepared(folder(tmp_path, "1.png", "2.png", metadata=rows, metadata_name="metadata.csv"), tmp_path / "out")
    assert found.texts == ["a cat", "a; dog"] and found.label_names == ["07", "7"] and found.labels == [1, 0]
    assert open_given(tmp_path).account.examples[Kind.COLUMN_NOT_USED] == ["width of metadata.csv"]


def test_of_several_caption_columns_one_has_to_be_named(tmp_path):
    rows = [{"file_name": "1.png", "caption_en": "a cat", "caption_de": "eine Katze"}]
    folder(tmp_path, "1.png", metadata=rows)
    source = open_given(tmp_path)
    assert not source.has_text and "--caption_column caption_en" in source.account.examples[Kind.COLUMN_NOT_USED][0]
    assert prepared(tmp_path, tmp_path / "out", caption_column="caption_de").texts == ["eine Katze"]
    with pytest.raises(
        UserError, match="--caption_column caption is not in metadata.jsonl; it has file_name, caption_en"
    ):
        open_given(tmp_path, caption_column="caption")


def test_several_rows_of_an_image_are_its_captions(tmp_path):
    rows = [*named("1.png"), *named("1.png", text="second"), *named("1.png", text="second")]
    source = open_given(folder(tmp_path, "1.png", metadata=rows))
    assert [entry.text for entry in source.entries] == ["about 0\nsecond"]
    assert source.account.counts[Kind.MERGED_ROW] == source.account.counts[Kind.DUPLICATE_ROW] == 1


def test_parquet_and_json_metadata(tmp_path):
    root = folder(tmp_path / "p", "1.png", "2.png")
    pq.write_table(
        pa.table({"file_name": ["1.png", "2.png"], "label": [1.0, None], "text": ["a", None]}),
        root / "metadata.parquet",
    )
    found = prepared(root, tmp_path / "out")
    assert found.label_names == ["1"] and found.labels == [0, -1] and found.texts == ["a", ""]
    root = folder(tmp_path / "j", "1.png", metadata='{"1.png": "a cat"}', metadata_name="metadata.json")
    assert prepared(root, tmp_path / "out2").texts == ["a cat"]


def test_the_dataset_json_of_edm(tmp_path):
    labels = {"labels": [["00000/1.png", 3], ["00000/2.png", 0]]}
    files = [("00000/1.png", png()), ("00000/2.png", png(1)), ("dataset.json", json.dumps(labels).encode())]
    found = prepared(write_zip(tmp_path / "edm.zip", files), tmp_path / "out")
    assert found.label_names == ["0", "3"] and found.labels == [1, 0]
    files[-1] = ("dataset.json", b'{"labels": null}')
    assert prepared(write_zip(tmp_path / "plain.zip", files), tmp_path / "out2").label_names is None


ENCODINGS = ("utf-8-sig", "utf-16", "utf-32", "utf-16-le", "cp1252", "utf-8")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_captions_in_any_encoding(tmp_path, encoding, kind):
    files = [("1.png", png()), ("1.TXT", "ein Café\r\nzwei".encode(encoding))]
    if kind == "folder":
        (tmp_path / "in").mkdir()
        for name, content in files:
            (tmp_path / "in" / name).write_bytes(content)
    given = {"folder": lambda: tmp_path / "in", "zip": lambda: write_zip(tmp_path / "in.zip", files)}.get(
        kind, lambda: write_tar(tmp_path / "in.tar.gz", files)
    )()
    assert prepared(given, tmp_path / "out").texts == ["ein Café\nzwei"]
    account = json.loads((tmp_path / "out" / "preparation.json").read_text())["account"]
    assert (Kind.FALLBACK_ENCODING.words() in account) == (encoding == "cp1252")


def test_a_file_that_is_not_text_is_rejected_by_name(tmp_path):
    folder(tmp_path, "1.png", "2.png")
    (tmp_path / "1.txt").write_bytes(b"\x81\x8d\xff")
    assert prepared(tmp_path, tmp_path / "out").rejected == {"bad_caption": 1}


@pytest.mark.parametrize("name", ["1.caption", "1.png.txt", "1.Caption", "1.PNG.TXT"])
def test_sidecars_of_other_tools(tmp_path, name):
    folder(tmp_path, "1.PNG" if "PNG" in name else "1.png", "2.png")
    (tmp_path / name).write_text("kohya writes this")
    np.save(tmp_path / "2.npy.tmp.npy", np.ones(3))
    (tmp_path / "2.npy.tmp.npy").replace(tmp_path / "2.NPY")
    source = open_given(tmp_path)
    assert source.has_text and source.vector_length == 3


def test_one_text_with_paragraphs_is_one_caption():
    assert caption_text("a cat.\n\nit sits") == "a cat. it sits" and caption_text("x\u2028y") == "x y"
    assert caption_text(["one", "two\nlines", None]) == "one\ntwo lines" and caption_text(float("nan")) is None


@pytest.mark.parametrize(
    "value, expected",
    [(None, None), (float("nan"), None), ("", None), (" ", None), ("nan", None), (True, "True"), (3, "3"), (3.0, "3"),
     ("3.0", "3"), ("07", "07"), ("cat ", "cat"), (b"cat", "cat"), ("None", "None")],
)  # fmt: skip
def test_values_of_labels(value, expected):
    assert class_name(value) == expected
    assert class_name("None", is_csv=True) is None  # as pandas reads it
    for wrong in (0.5, [1], {"a": 1}):
        with pytest.raises(NotAClass):
            class_name(wrong)


def test_the_order_of_classes_is_a_function_of_their_names():
    for names in ({"7", "07", "007", "10", "1"}, {"10", "007", "1", "07", "7"}):
        assert sorted_labels(names) == ["1", "007", "07", "7", "10"]
    account = Account()
    sorted_labels({"1", "2", "10", "B\u00fcro"} - {"B\u00fcro"}, account)
    assert account.examples[Kind.CLASS_ORDER] == ["1, 2, 10, ... here, 1, 10, 2, ... there"]
    sorted_labels({"B\u00fcro", "Bu\u0308ro"}, account)
    assert account.counts[Kind.SIMILAR_NAMES] == 1


@pytest.mark.parametrize(
    "column, names, labels",
    [
        (pa.array([1.0, None, 2.0]), ["1", "2"], [0, -1, 1]),
        (pa.array([True, False, None]), ["False", "True"], [1, 0, -1]),
        (pa.array(["a", "", "nan"]), ["a"], [0, -1, -1]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["a", "b"], [1, 0, 1]),
        (pa.array([[1], [2], None]), None, []),
        (pa.array([0.5, 1.5, 2.5]), None, []),
        (pa.array(["x", "y", None], pa.large_string()), ["x", "y"], [0, 1, -1]),
    ],
    ids=str,
)
def test_labels_in_tables(tmp_path, column, names, labels):
    table = pa.table({"image": [png(i) for i in range(3)], "label": column})
    pq.write_table(table, tmp_path / "t.parquet")
    found = prepared(tmp_path / "t.parquet", tmp_path / "out")
    assert found.label_names == names and (names is None or found.labels == labels)


def test_what_a_file_is_instead_of_an_image(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name, content in (
        ("a.jpg", pointer),
        ("b.heic", b"\0\0\0\x18ftypheic" + bytes(99)),
        ("c.png", b"<html><body>"),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "d.png").write_bytes(png())
    assert prepared(tmp_path, tmp_path / "out").rejected == {"git_lfs_pointer": 1, "heic": 1, "web_page": 1}
    (tmp_path / "lfs").mkdir()
    (tmp_path / "lfs/train-00000-of-00001.parquet").write_bytes(pointer)
    with pytest.raises(UserError, match="parquet is a git-lfs pointer, not the file itself: run `git lfs pull`"):
        open_given(tmp_path / "lfs")


def test_classes_from_the_folder_at_the_top(tmp_path):
    folder(tmp_path, "cat/1.png", "cat/old/2.png", "dog/3.png")
    assert open_given(tmp_path).label_names is None
    source = open_given(tmp_path, label_from="top_folder")
    assert [entry.label for entry in source.entries] == ["cat", "cat", "dog"]
    assert open_given(tmp_path / "cat", label_from="none").label_names is None


def test_dots_are_part_of_names_without_samples(tmp_path):
    files = [("a.png", png()), ("a.crop.png", png(1)), ("other.json", b"{}"), ("b.cls", b"1")]
    assert prepared(write_zip(tmp_path / "x.zip", files), tmp_path / "out").names == ["a.png", "a.crop.png"]


def test_the_account_is_kept_and_adds_up(tmp_path, capsys):
    folder(tmp_path / "in", "1.png", "2.png", "3.png", metadata=named("1.png", "2.png", "gone.png"))
    (tmp_path / "in" / "notes.pdf").write_bytes(b"")
    from trainkit.data.preparation.card import print_card

    prepared(tmp_path / "in", tmp_path / "out")
    print_card(tmp_path / "out")
    card = capsys.readouterr().out
    for line in ("3 metadata rows used", "1 metadata row without an image: metadata.jsonl line 3: gone.png",
                 "1 image without a metadata row, not used: 3.png", "file that is not an image: .pdf 1"):  # fmt: skip
        assert line in card
    text, fallback = decode_text(b"plain")
    assert (text, fallback) == ("plain", False)
