"""What is listed, and what is known of it before an image is opened."""

import json
import os
import shutil
import time

import datasets
import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from trainkit.data.account import Kind
from trainkit.data.sources.entries import Entry
from trainkit.data.sources.folder import ImageFolder
from trainkit.data.sources.hub import HubDataset
from trainkit.data.sources.opening import open_source
from trainkit.data.sources.records import cut_by_name
from trainkit.errors import UserError
from trainkit.options.data import SourceOptions


def write_image(path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)


def write_text(path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def listed(source) -> list[str]:
    return [entry.path for entry in source.entries]


def records(source) -> dict:
    """Name -> record, of every item."""
    reader = source.reader
    return {reader.name(item): reader.read(item) for unit in source.units() for item in unit.items}


def test_listing_is_recursive_sorted_and_passes_over_what_is_no_image(tmp_path):
    for name in ("b/2.PNG", "b/1.png", "a.jpeg", "b/c/d.webp", ".hidden/x.png", "b/.x.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    for name in ("notes.md", "b/1.xcf", "LICENSE"):
        (tmp_path / name).write_bytes(b"")
    assert listed(ImageFolder(tmp_path)) == ["a.jpeg", "b/1.png", "b/2.PNG", "b/c/d.webp"]


def test_linked_folders_are_followed_once(tmp_path):
    write_image(tmp_path / "a/1.png")
    write_image(tmp_path.parent / f"{tmp_path.name}-elsewhere/2.png")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    assert listed(ImageFolder(tmp_path)) == ["a/1.png", "linked/2.png"]


def test_class_folders_become_labels(tmp_path):
    for name in ("dog/1.png", "cat/1.png", "cat/2.png"):
        write_image(tmp_path / name)
    source = ImageFolder(tmp_path)
    assert source.label_names == ["cat", "dog"]
    assert {name: record.label for name, record in records(source).items()} == {
        "cat/1.png": 0,
        "cat/2.png": 0,
        "dog/1.png": 1,
    }


@pytest.mark.parametrize("names", [["a/1.png", "2.png"], ["a/1.png", "a/2.png"], ["a/1.png", "b/c/1.png"]])
def test_other_folders_are_no_labels(tmp_path, names):
    for name in names:
        write_image(tmp_path / name)
    assert ImageFolder(tmp_path).label_names is None


@pytest.mark.parametrize("split", ["class folders", "root", "uneven"])
def test_labels_agree_with_the_imagefolder_of_datasets(tmp_path, split):
    names = {"class folders": ["x/b/1.png", "x/a/2.png", "y/b/3.png"], "root": ["1.png", "b/2.png"]}
    for name in names.get(split, ["a/1.png", "b/2.png", "b/c/3.png"]):
        write_image(tmp_path / "images" / name)
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "images"), split="train", cache_dir=str(tmp_path / "cache")
    )
    names = theirs.features["label"].names if "label" in theirs.features else None
    assert ImageFolder(tmp_path / "images").label_names == names


def test_metadata_csv_and_jsonl_tell_labels_and_captions(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        write_image(tmp_path / name)
    write_text(tmp_path / "a/metadata.csv", 'file_name,text,label\n1.png,"a cat, asleep",10\n2.png,,9\n')
    write_text(tmp_path / "b/metadata.jsonl", '{"file_name": "1.png", "caption": "ein Häuschen", "label": 10}\n')
    source = ImageFolder(tmp_path)
    assert source.label_names == ["9", "10"]  # not the folders' names: where metadata tells labels, it tells all
    found = records(source)
    assert found["a/1.png"].text == "a cat, asleep" and found["b/1.png"].text == "ein Häuschen"
    assert found["a/2.png"].text is None and "b/2.png" not in found  # `datasets` reads what metadata lists
    assert source.account.counts[Kind.IMAGE_WITHOUT_ROW] == 1
    assert [found[name].label for name in ("a/1.png", "a/2.png", "b/1.png")] == [1, 0, 1]


def test_captions_alone_leave_the_class_folders_as_labels(tmp_path):
    write_image(tmp_path / "a/1.png")
    write_image(tmp_path / "b/2.png")
    write_text(tmp_path / "metadata.csv", "file_name,text\na/1.png,hello\nb/2.png,\n")
    assert ImageFolder(tmp_path).label_names == ["a", "b"]


def test_numeric_labels_keep_their_order(tmp_path):
    lines = ["file_name,label"]
    for number in range(12):
        write_image(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{number}")
    write_text(tmp_path / "metadata.csv", "\n".join(lines))
    source = ImageFolder(tmp_path)
    assert source.label_names == [str(number) for number in range(12)]
    assert records(source)["11.png"].label == 11


def test_metadata_may_name_missing_files_and_any_extension(tmp_path):
    write_image(tmp_path / "1.png")
    shutil.copy(tmp_path / "1.png", tmp_path / "picture.data")
    write_text(tmp_path / "metadata.csv", "file_name,text\npicture.data,odd\ngone.png,away\n")
    source = ImageFolder(tmp_path)
    assert listed(source) == ["gone.png", "picture.data"]
    assert source.account.examples[Kind.ROW_WITHOUT_IMAGE] == ["metadata.csv line 3: gone.png"]


def test_captions_beside_the_images(tmp_path):
    for name in ("1.png", "2.old.jpg", "3.png"):
        write_image(tmp_path / name)
    write_text(tmp_path / "1.txt", "one\n")
    write_text(tmp_path / "2.old.txt", "zwei\n")
    source = ImageFolder(tmp_path)
    assert source.has_text
    assert {name: record.text for name, record in records(source).items()} == {
        "1.png": "one",
        "2.old.jpg": "zwei",
        "3.png": None,
    }


def test_fingerprint_follows_the_files_not_the_folder(tmp_path):
    for number in range(5):
        write_image(tmp_path / f"before/{number}.png")
    write_text(tmp_path / "before/1.txt", "one")
    first = ImageFolder(tmp_path / "before").fingerprint
    (tmp_path / "before").rename(tmp_path / "after")
    assert ImageFolder(tmp_path / "after").fingerprint == first
    os.utime(tmp_path / "after/1.txt", ns=(5, 5))
    second = ImageFolder(tmp_path / "after").fingerprint
    write_image(tmp_path / "after/2.png", value=9)
    os.utime(tmp_path / "after/2.png", ns=(5, 5))
    assert len({first, second, ImageFolder(tmp_path / "after").fingerprint}) == 3


@pytest.mark.slow
def test_cuts_depend_on_names_so_that_an_added_file_moves_few(tmp_path):
    def units(names):
        return {tuple(entry.path for entry in unit) for unit in cut_by_name(entries(names), 16)}

    def entries(names):
        return [Entry(name, 1, 1) for name in sorted(names)]

    names = [f"img{number:05d}.png" for number in range(3000)]
    before = units(names)
    assert 0.6 * 3000 / 16 < len(before) < 1.6 * 3000 / 16
    assert max(map(len, before)) <= 64
    changed = [len(units([*names, f"img{number:05d}b.png"]) - before) for number in range(0, 3000, 30)]
    assert np.median(changed) == 1 and np.mean(changed) < 2


def test_a_listing_of_many_files_is_quick(tmp_path):
    for number in range(5000):
        (tmp_path / f"{number}.jpg").touch()
    started = time.process_time()
    assert len(ImageFolder(tmp_path)) == 5000
    assert time.process_time() - started < 0.5


def test_user_errors_name_the_flag_and_the_fix(tmp_path):
    file = tmp_path / "file.jpg"
    write_image(file)
    empty = tmp_path / "empty"
    empty.mkdir()
    texts = tmp_path / "texts"
    write_text(texts / "notes.md", "none")
    cases = {
        tmp_path / "nowhere": "--train_data_dir .*nowhere does not exist",
        file: "is a file; give the folder",
        empty: "holds no image file .nothing found",
        texts: "holds no image file ..md found",
    }
    for folder, message in cases.items():
        with pytest.raises(UserError, match=message):
            ImageFolder(folder)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.csv", "text\nhello\n", "line 2 has no `file_name`"),
        ("metadata.csv", "file_name\n../../secret.png\n", "is outside of"),
        ("metadata.jsonl", '{"file_name": "1.png"}\n{"file_na', "metadata.jsonl cannot be read"),
        ("metadata.jsonl", "[1]\n", "line 1 is not an object"),
    ],
)
def test_bad_metadata_is_a_user_error(tmp_path, name, content, message):
    write_image(tmp_path / "1.png")
    write_text(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        ImageFolder(tmp_path)


def saved_dataset(folder, **extra):
    images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(6)]
    columns = {"picture": images, "kind": [0, 1] * 3, "caption": [f"number {n}" for n in range(6)]} | extra
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["even", "odd"]),
            "caption": datasets.Value("string"),
        }
        | {name: datasets.Value("int64") for name in extra}
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder)


def test_a_saved_dataset_gives_images_labels_and_captions(tmp_path):
    saved_dataset(tmp_path / "saved", number=list(range(6)))
    source = HubDataset(str(tmp_path / "saved"))
    assert source.label_names == ["even", "odd"] and source.has_text and len(source) == 6
    record = records(source)["row 3"]
    assert record.label == 1 and record.text == "number 3" and record.image.startswith(b"\x89PNG")
    assert HubDataset(str(tmp_path / "saved")).fingerprint == source.fingerprint


def test_a_local_folder_that_load_dataset_understands(tmp_path):
    for name in ("a/1.png", "b/2.png"):
        write_image(tmp_path / "images" / name)
    source = HubDataset(str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    assert source.label_names == ["a", "b"] and len(source) == 2
    assert all(os.path.exists(record.image) for record in records(source).values())


def test_dataset_errors_name_the_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--dataset_name no/such-thing cannot be loaded"):
        HubDataset("no/such-thing", cache_dir=str(tmp_path / "cache"))
    datasets.Dataset.from_dict({"number": [1]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(UserError, match="has no image column .*; it has number"):
        HubDataset(str(tmp_path / "numbers"))
    with pytest.raises(UserError, match="--train_data_dir .* has no image column"):
        open_source(SourceOptions(train_data_dir=str(tmp_path / "numbers")))
    (tmp_path / "numbers/preparation.json").write_text("{}")
    with pytest.raises(UserError, match="is a prepared dataset already"):
        open_source(SourceOptions(train_data_dir=str(tmp_path / "numbers")))
    saved_dataset(tmp_path / "parts" / "train")
    (tmp_path / "parts/dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    with pytest.raises(UserError, match="--dataset_split test is not in"):
        HubDataset(str(tmp_path / "parts"), split="test")
