"""Splits are read by the rules of `datasets`: folders, file names, shards, a README; what is left out is counted."""

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import open_given, png, prepared, write_zip

from trainkit.data.account import Kind
from trainkit.data.sources.splits import find_splits, split_by_file, split_by_folder, split_by_shard
from trainkit.errors import UserError


def write(root, *names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return root


def parquet(path, count):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [{"bytes": png(i), "path": None} for i in range(count)]}), path)


FOLDERS = (
    ("train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "test/dog/2.png"),
    ("my-train/1.png", "my-train/2.png", "dev_set/3.png"),
    ("training/1.png", "evaluation/2.png", "validation/3.png"),
    ("x/train_2024/a.png", "x/val/b.png"),
)


@pytest.mark.parametrize("names", FOLDERS, ids=str)
def test_folders_are_read_as_datasets_reads_them(tmp_path, names):
    root = write(tmp_path / "photos", *names)
    wanted = datasets.load_dataset(
        "imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "cache"), drop_labels=True
    ).cast_column("image", datasets.Image(decode=False))
    theirs = sorted(row["path"].removeprefix(f"{root}/") for row in wanted["image"])
    source = open_given(root)
    assert sorted(source.reader.name(entry) for entry in source.entries) == theirs
    assert source.account.counts[Kind.OTHER_SPLIT] == len(names) - len(theirs)


def test_rows_about_another_split_are_named(tmp_path):
    root = write(tmp_path / "photos", "train/1.png", "test/2.png")
    (root / "metadata.csv").write_text("file_name,text\ntrain/1.png,one\ntest/2.png,two\n", encoding="utf-8")
    found = prepared(root, tmp_path / "out")
    assert found.names == ["train/1.png"] and found.texts == ["one"]
    account = open_given(root).account
    assert account.counts[Kind.METADATA_ROWS] == 1
    assert account.examples[Kind.OTHER_SPLIT_ROWS] == ["metadata.csv line 3: test/2.png"]


def test_another_split_is_read_where_it_is_named(tmp_path):
    root = write(tmp_path, *FOLDERS[0])
    source = open_given(root, dataset_split="test")
    assert [entry.path for entry in source.entries] == ["test/cat/2.png", "test/dog/2.png"]
    assert source.label_names == ["cat", "dog"]
    assert len(open_given(root, dataset_split="all")) == 4
    with pytest.raises(UserError, match=r"--dataset_split val is not in .* test \(2\), train \(2\)"):
        open_given(root, dataset_split="val")


def test_a_class_that_is_called_train_stops_with_a_line(tmp_path):
    root = write(tmp_path, "car/1.png", "bus/1.png", "train/1.png")
    with pytest.raises(
        UserError, match=r"splits \(train \(1\)\) and 2 others, such as bus/1.png: --dataset_split all"
    ):
        open_given(root)
    assert open_given(root, dataset_split="all").label_names == ["bus", "car", "train"]


def test_a_picture_above_the_split_folders_is_counted(tmp_path):
    source = open_given(write(tmp_path, "train/1.png", "test/1.png", "preview.png"))
    assert len(source) == 1 and source.account.examples[Kind.NO_SPLIT] == ["preview.png"]


def test_capital_letters_stop_with_a_line(tmp_path):
    with pytest.raises(UserError, match="write names of splits in small letters"):
        open_given(write(tmp_path, "Train/1.png", "Test/1.png"))


def test_file_names_count_where_all_of_them_name_a_split(tmp_path):
    source = open_given(write(tmp_path / "all", "train_1.png", "train_2.png", "test_1.png"))
    assert [entry.path for entry in source.entries] == ["train_1.png", "train_2.png"]
    source = open_given(write(tmp_path / "some", "test.png", "holiday.png"))
    assert len(source) == 2 and source.account.examples[Kind.SPLIT_NAME] == ["test.png"]


def test_splits_inside_an_archive_and_of_archives(tmp_path):
    inside = write_zip(
        tmp_path / "a.zip", [("train/a/1.png", png()), ("test/a/2.png", png()), ("train/b/3.png", png())]
    )
    assert prepared(inside, tmp_path / "out").names == ["train/a/1.png", "train/b/3.png"]
    for name in ("train-000", "train-001", "test-000"):
        (tmp_path / "tars").mkdir(exist_ok=True)
        write_zip(tmp_path / "tars" / f"{name}.zip", [(f"{name}.png", png())])
    assert len(open_given(tmp_path / "tars")) == 2


def test_parquet_shards_of_the_split(tmp_path):
    for split, shards in (("train", 2), ("test", 1), ("extra", 1)):
        for shard in range(shards):
            parquet(tmp_path / f"data/{split}-{shard:05d}-of-{shards:05d}.parquet", 3)
    assert len(open_given(tmp_path)) == 6
    assert len(open_given(tmp_path, dataset_split="extra")) == 3
    assert len(open_given(f"{tmp_path}/data/*.parquet", dataset_split="test")) == 3


def test_the_data_files_of_a_readme(tmp_path):
    parquet(tmp_path / "first/a.parquet", 2)
    parquet(tmp_path / "second/b.parquet", 3)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: first/*.parquet\n"
        "  - split: test\n    path: second/*\n- config_name: big\n  data_files: second/*.parquet\n---\n# Photos\n"
    )
    assert len(open_given(tmp_path, dataset_config_name="small")) == 2
    assert len(open_given(tmp_path, dataset_config_name="small", dataset_split="test")) == 3
    assert len(open_given(tmp_path, dataset_config_name="big")) == 3
    with pytest.raises(UserError, match="--dataset_config_name huge is not in .*README.md, which has small, big"):
        open_given(tmp_path, dataset_config_name="huge")


def test_keywords_stand_alone():
    assert split_by_folder("training_set/x/1.png") == "train" and split_by_folder("strain/1.png") is None
    assert split_by_folder("trains/1.png") is None and split_by_folder("a/eval 2/1.png") == "test"
    assert split_by_file("a/dev-1.png") == "validation" and split_by_file("a/developer.png") is None
    assert split_by_shard("data/train-00000-of-00002.parquet") == "train"
    assert find_splits(["a/1.png", "b/2.png"]) == (None, {})


def test_a_readme_above_the_folder_of_all_files(tmp_path):
    parquet(tmp_path / "data/first-half.parquet", 2)
    parquet(tmp_path / "data/second-half.parquet", 3)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/second*\n"
        "  - split: test\n    path: data/first*\n---\n"
    )
    assert len(open_given(tmp_path)) == 3 and len(open_given(tmp_path, dataset_split="test")) == 2


def test_data_without_splits_is_the_split_train(tmp_path):
    parquet(tmp_path / "x/a.parquet", 2)
    write(tmp_path / "photos", "a/1.png", "b/2.png")
    for given in (tmp_path / "x", tmp_path / "photos"):
        with pytest.raises(UserError, match="--dataset_split test is not in .*, which has no splits"):
            open_given(given, dataset_split="test")


def test_a_file_of_another_split_that_is_given_is_meant(tmp_path):
    parquet(tmp_path / "test-00000-of-00001.parquet", 2)
    assert len(open_given(tmp_path / "test-00000-of-00001.parquet")) == 2
    with pytest.raises(UserError, match="--dataset_split train is not in"):
        open_given(tmp_path)


def test_the_names_of_archives_decide_before_what_is_inside(tmp_path):
    write_zip(tmp_path / "train.zip", [("test/1.png", png()), ("b/2.png", png())])
    write_zip(tmp_path / "val.zip", [("3.png", png())])
    source = open_given(tmp_path)
    assert len(source) == 2 and source.account.examples[Kind.OTHER_SPLIT] == ["val.zip"]


def test_urls_follow_the_same_rules(tmp_path):
    store = fsspec.filesystem("memory")
    parquet(tmp_path / "x.parquet", 2)
    for name in ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"):
        store.pipe(f"/snapshot/{name}", (tmp_path / "x.parquet").read_bytes())
    store.pipe("/snapshot/assets/preview.png", png())
    source = open_given("memory://snapshot")
    assert len(source) == 2 and source.account.examples[Kind.OTHER_FORMAT] == ["assets/preview.png"]
    assert source.account.counts[Kind.OTHER_SPLIT] == 1
    store.pipe("/snapshot/README.md", b"---\nconfigs:\n- data_files: data/test*\n  config_name: x\n---\n")
    assert [file.name for file in open_given("memory://snapshot").files] == ["test-00000-of-00001.parquet"]
    store.pipe("/snapshot/data/train-00000-of-00001.parquet", b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git-lfs pointer"):
        open_given("memory://snapshot")
    for name in ("train/a/1.png", "test/a/2.png"):
        store.pipe(f"/pictures/{name}", png())
    assert len(open_given("memory://pictures")) == 1
