"""Layouts of data that other programs write, row by row as `datasets` or their owner reads them.

An image is known by its grey value. A row is that value, the name of its class and its captions.
"""

import io
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from source_files import open_given, png, prepared, write_tar, write_zip

from trainkit.data.account import Kind


def write(root: Path, files: dict[str, bytes | str | list]) -> Path:
    """Bytes and text as they are, lists as JSON lines."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def jpg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (value, value, value)).save(buffer, "JPEG")
    return buffer.getvalue()


def rows_of(given: str | Path, output: Path, **options) -> list[tuple]:
    found = prepared(given, output, **options)
    assert not found.rejected
    values = found.pixels[:, 0, 0, 0].astype(np.uint8).tolist()
    names = [None if label < 0 else found.label_names[label] for label in found.labels]
    return by_value(zip(values, names, (tuple(text.splitlines()) for text in found.texts), strict=True))


def rows_of_datasets(tmp_path, *given, label=None, text=None, image="image", **options) -> list[tuple]:
    """The same of `load_dataset`. Rows about one image are put together, as several captions."""
    loaded = datasets.load_dataset(*given, cache_dir=str(tmp_path / "cache"), **{"split": "train"} | options)
    rows: dict[tuple, list[str]] = {}
    for row in loaded:
        name = None if label is None else row[label]
        if name is not None and isinstance(loaded.features[label], datasets.ClassLabel):
            name = loaded.features[label].int2str(name)
        elif isinstance(name, float):
            name = str(int(name))
        value = np.asarray(row[image].convert("RGB"))[0, 0, 0].item()
        captions = rows.setdefault((value, name), [])
        captions += [] if text is None or row[text] is None else [row[text]]
    return by_value((*key, tuple(captions)) for key, captions in rows.items())


def by_value(rows: Iterable[tuple]) -> list[tuple]:
    return sorted(rows, key=lambda row: row[0])


def test_imagefolder_with_metadata_jsonl(tmp_path):
    table = [{"file_name": f"{number}.png", "text": f"number {number}"} for number in range(4)]
    root = write(tmp_path / "in", {f"{number}.png": png(number) for number in range(5)} | {"metadata.jsonl": table})
    wanted = rows_of_datasets(tmp_path, "imagefolder", data_dir=str(root), text="text")
    assert rows_of(root, tmp_path / "out") == wanted and len(wanted) == 4


def test_imagefolder_with_a_metadata_file_in_each_folder(tmp_path):
    files = {f"{folder}/{number}.png": png(number + 10 * (folder == "b")) for folder in "ab" for number in range(2)}
    for folder in "ab":
        rows = [{"file_name": f"{number}.png", "text": f"{folder} {number}"} for number in range(2)]
        files[f"{folder}/metadata.jsonl"] = rows
    root = write(tmp_path / "in", files)
    wanted = rows_of_datasets(tmp_path, "imagefolder", data_dir=str(root), text="text")
    assert rows_of(root, tmp_path / "out", label_from="none") == wanted


def test_imagefolder_with_several_rows_of_an_image(tmp_path):
    table = "file_name,text\n1.png,first\n2.png,alone\n1.png,second\n"
    root = write(tmp_path / "in", {"1.png": png(1), "2.png": png(2), "metadata.csv": table})
    wanted = rows_of_datasets(tmp_path, "imagefolder", data_dir=str(root), text="text")
    assert rows_of(root, tmp_path / "out") == wanted == [(1, None, ("first", "second")), (2, None, ("alone",))]


def test_imagefolder_in_an_archive(tmp_path):
    table = b"file_name,text\na/1.png,first\nb/2.png,second\n"
    path = write_zip(tmp_path / "in.zip", [("a/1.png", png(1)), ("b/2.png", png(2)), ("metadata.csv", table)])
    wanted = rows_of_datasets(tmp_path, "imagefolder", data_files=str(path), text="text")
    assert rows_of(path, tmp_path / "out", label_from="none") == wanted


def test_caption_folders_of_kohya(tmp_path):
    """A caption is in NAME.txt or NAME.caption. With both, the other one is named. Folders are classes."""
    root = write(tmp_path / "in", {
        "10_cat/1.png": png(1), "10_cat/1.txt": "cat, sitting, outdoors", "10_cat/2.png": png(2),
        "10_cat/2.caption": "cat, \u732b\n", "5_dog/3.png": png(3), "5_dog/3.txt": "dog", "5_dog/3.caption": "other",
        "5_dog/3.npz": b"latents", "meta_lat.json": "{}",
    })  # fmt: skip
    assert rows_of(root, tmp_path / "out") == [
        (1, "10_cat", ("cat, sitting, outdoors",)), (2, "10_cat", ("cat, \u732b",)), (3, "5_dog", ("dog",)),
    ]  # fmt: skip
    assert open_given(root).account.examples[Kind.SIDECAR_NOT_READ] == ["5_dog/3.caption"]


def test_concept_folders_of_onetrainer(tmp_path):
    """Every line of NAME.txt is a caption; NAME-masklabel.png and NAME-condlabel.png are not images to train on."""
    root = write(tmp_path / "in", {
        "1.png": png(1), "1.txt": "a cat\na cat on a chair\n", "1-masklabel.png": png(255),
        "1-condlabel.png": png(254), "sub/2.jpg": jpg(2), "sub/2.txt": "a dog",
    })  # fmt: skip
    wanted = [(1, None, ("a cat", "a cat on a chair")), (2, None, ("a dog",))]
    assert rows_of(root, tmp_path / "out") == wanted
    files = [(path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(root.rglob("*.*"))]
    packed = write_zip(tmp_path / "in.zip", files)
    assert rows_of(packed, tmp_path / "packed") == wanted
    for given in (root, packed):
        assert open_given(given).account.examples[Kind.MASK] == ["1-condlabel.png", "1-masklabel.png"]


def test_the_zip_of_edm(tmp_path):
    """dataset.json holds [name, class] for each image."""
    names = [f"0000{number // 2}/img{number:08d}.png" for number in range(4)]
    labels = {"labels": [[name, label] for name, label in zip(names, (2, 0, 10, 2), strict=True)]}
    files = [(name, png(number)) for number, name in enumerate(names)]
    path = write_zip(tmp_path / "edm.zip", [*files, ("dataset.json", json.dumps(labels).encode())])
    assert rows_of(path, tmp_path / "out") == [(0, "2", ()), (1, "0", ()), (2, "10", ()), (3, "2", ())]


def test_the_tree_of_imagenet(tmp_path):
    classes = ("n02119789", "n01440764", "n10565667")
    files = {f"train/{name}/{name}_{i}.JPEG": jpg(40 * n + i) for n, name in enumerate(classes) for i in range(2)}
    root = write(tmp_path / "in", files | {f"val/{name}/ILSVRC2012_val_0.JPEG": jpg(200) for name in classes})
    wanted = rows_of_datasets(tmp_path, "imagefolder", data_dir=str(root), label="label")
    assert rows_of(root, tmp_path / "out") == wanted and len(wanted) == 6
    assert open_given(root).label_names == sorted(classes)


def parquet_of(rows: dict, path: Path, **features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = rows | {"image": [{"bytes": content, "path": None} for content in rows["image"]]}
    datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), **features)).to_parquet(path)


@pytest.mark.parametrize("config, split", [("default", "train"), ("default", "test"), ("small", "train")])
def test_a_snapshot_of_the_hub(tmp_path, config, split):
    """Parquet shards of several splits and configs, named in the README."""
    root = write(tmp_path / "in", {"README.md": (
        "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: data/train-*\n  - split: test\n    path: data/test-*\n- config_name: small\n"
        "  data_files:\n  - split: train\n    path: small/*.parquet\n---\n# Photos\n"
    )})  # fmt: skip
    kinds = {"label": datasets.ClassLabel(names=["cat", "dog"]), "text": datasets.Value("string")}
    shards = ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001", "small/part")
    for number, shard in enumerate(shards):
        values = range(10 * number, 10 * number + 3)
        columns = {"image": list(map(png, values)), "label": [1, 0, 1], "text": [f"number {v}" for v in values]}
        parquet_of(columns, root / f"{shard}.parquet", **kinds)
    wanted = rows_of_datasets(tmp_path, str(root), config, split=split, label="label", text="text")
    found = rows_of(root, tmp_path / "out", dataset_config_name=config, dataset_split=split)
    assert found == wanted and len(wanted) == (6 if (config, split) == ("default", "train") else 3)


def test_a_tar_of_img2dataset(tmp_path):
    files = []
    for number in range(3):
        key = f"{number:09d}"
        about = {"caption": f"caption {number}", "url": "https://example.org/a.b.jpg", "key": key, "status": "success",
                 "width": 16, "height": 16, "original_width": 99, "exif": "{}", "similarity": 0.31}  # fmt: skip
        files += [(f"{key}.jpg", jpg(20 * number)), (f"{key}.txt", f"caption {number}".encode()),
                  (f"{key}.json", json.dumps(about).encode())]  # fmt: skip
    path = write_tar(tmp_path / "00000.tar", files)
    wanted = rows_of_datasets(tmp_path, "webdataset", data_files=str(path), image="jpg", text="txt")
    assert rows_of(path, tmp_path / "out") == wanted
    without = write_tar(tmp_path / "00001.tar", [file for file in files if not file[0].endswith(".txt")])
    assert rows_of(without, tmp_path / "out2") == wanted  # the captions in .json


def test_a_folder_of_img2dataset(tmp_path):
    """Next to each shard are its table and its statistics."""
    for shard in range(2):
        samples = [("0.jpg", jpg(10 * shard)), ("0.txt", b"caption"), ("0.json", b'{"caption": "caption"}')]
        root = write_tar(tmp_path / f"{shard:05d}.tar", samples).parent
        write(root, {f"{shard:05d}_stats.json": "{}"})
        pd.DataFrame({"url": ["https://example.org"], "caption": ["caption"]}).to_parquet(
            root / f"{shard:05d}.parquet"
        )
    assert rows_of(root, tmp_path / "prepared" / "out") == [(0, None, ("caption",)), (10, None, ("caption",))]
    assert open_given(root).account.examples[Kind.TABLE_NOT_READ] == ["00000.parquet", "00001.parquet"]


def test_the_files_of_img2dataset(tmp_path):
    """With output_format=files the same samples are files in numbered folders, which are shards and not classes."""
    files = {}
    for shard, number in itertools.product(range(2), repeat=2):
        key = f"{shard:05d}/{shard:05d}000{number}"
        files |= {f"{key}.jpg": jpg(40 * shard + 20 * number), f"{key}.txt": f"caption {shard} {number}"}
        files[f"{key}.json"] = "{}"
    root = write(tmp_path / "in", files)
    found = rows_of(root, tmp_path / "out", label_from="none")
    assert found == [(40 * s + 20 * n, None, (f"caption {s} {n}",)) for s in range(2) for n in range(2)]
    assert open_given(root).account.counts[Kind.SIDECAR_NOT_READ] == 4


def test_the_captions_of_coco(tmp_path):
    """Captions name their image by its id, and an image has several. Names with val are of the validation split."""
    names = ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg"]
    captions = [(73, "a motorcycle"), (42, "a shoe rack"), (73, "two motorcycles"), (42, "a dog sleeps")]
    content = {
        "info": {"year": 2014}, "licenses": [{"id": 1}],
        "images": [{"id": 42, "file_name": names[0], "height": 16}, {"id": 73, "file_name": names[1], "height": 16}],
        "annotations": [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(captions)],
    }  # fmt: skip
    files = {names[0]: jpg(42), names[1]: jpg(73), "metadata.json": json.dumps(content)}
    assert rows_of(write(tmp_path / "in", files), tmp_path / "out", dataset_split="validation") == [
        (42, None, ("a shoe rack", "a dog sleeps")), (73, None, ("a motorcycle", "two motorcycles")),
    ]  # fmt: skip


def test_the_attribute_table_of_celeba(tmp_path):
    """A row per image with -1 or 1 per attribute: nothing in it is a class or a caption, and columns are named."""
    table = pd.DataFrame({"image_id": ["000001.jpg", "000003.jpg"], "Bald": [-1, 1], "Smiling": [1, -1]})
    files = {f"{number:06d}.jpg": jpg(number) for number in range(1, 4)}
    root = write(tmp_path / "in", files | {"metadata.csv": table.to_csv(index=False)})
    assert rows_of(root, tmp_path / "out") == [(1, None, ()), (3, None, ())]
    account = open_given(root).account
    assert account.examples[Kind.COLUMN_NOT_USED] == ["Bald of metadata.csv", "Smiling of metadata.csv"]
    assert account.examples[Kind.IMAGE_WITHOUT_ROW] == ["000002.jpg"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_folders_of_splits(tmp_path, split):
    files = {f"{part}/{name}/{number}.png": png(value) for value, (part, name, number) in enumerate(
        (part, name, number) for part in ("train", "test") for name in ("cat", "dog") for number in range(2)
    )}  # fmt: skip
    root = write(tmp_path / "in", files)
    wanted = rows_of_datasets(tmp_path, "imagefolder", data_dir=str(root), label="label", split=split)
    assert rows_of(root, tmp_path / "out", dataset_split=split) == wanted and len(wanted) == 4


def test_a_table_of_pandas_with_gaps(tmp_path):
    """A gap makes pandas write whole numbers with a fraction, and leaves captions empty."""
    table = pd.DataFrame({"file_name": [f"{number}.png" for number in range(4)], "label": [7, None, 10, 7],
                          "text": ["one", "NA", None, "four"]})  # fmt: skip
    files = {f"{number}.png": png(number) for number in range(4)} | {"metadata.csv": table.to_csv(index=False)}
    root = write(tmp_path / "in", files)
    wanted = rows_of_datasets(tmp_path, "imagefolder", data_dir=str(root), label="label", text="text")
    assert rows_of(root, tmp_path / "out") == wanted
    assert wanted[1] == (1, None, ()) and wanted[2] == (2, "10", ())


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-be", "utf-8-sig"])
def test_captions_of_windows_programs(tmp_path, encoding):
    text = "caf\u00e9 \u2013 d\u00e9j\u00e0 vu"
    root = write(tmp_path / "in", {"1.jpg": jpg(1), "1.TXT": f"{text}\r\n".encode(encoding)})
    assert rows_of(root, tmp_path / "out") == [(1, None, (text,))]


def test_a_saved_dataset_with_classes(tmp_path):
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["zebra", "ant", "never"]),
        text=datasets.List(datasets.Value("string")),
    )  # fmt: skip
    images = [{"bytes": png(number), "path": None} for number in range(3)]
    texts = [["a", "b"], [], ["c"]]
    saved = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0], "text": texts}, features)
    saved.save_to_disk(tmp_path / "in")
    loaded = datasets.load_from_disk(str(tmp_path / "in"))
    wanted = [
        (np.asarray(row["image"])[0, 0, 0].item(), features["label"].int2str(row["label"]), tuple(row["text"]))
        for row in loaded
    ]
    assert rows_of(tmp_path / "in", tmp_path / "out") == wanted
    assert open_given(tmp_path / "in").label_names == ["zebra", "ant", "never"]
