"""Files by URL: in object stores, too, with the credentials kept where they belong; and vectors beside images."""

import json
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import fresh_s3
from source_files import SETTINGS, assert_same, files_of, open_given, prepared, write_photos, write_tar, write_zip

from trainkit.data.preparation.prepare import prepare
from trainkit.data.sources import locations
from trainkit.data.sources.finding import expand_braces, find_files
from trainkit.data.sources.locations import read_storage_options
from trainkit.errors import UserError
from trainkit.options.training import SECRET_OPTIONS

SECRET = "a-very-secret-word"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


@pytest.fixture(scope="module")
def store(photos, tmp_path_factory):
    """`--storage_options` of an S3 that holds the photos as they are and packed."""
    with fresh_s3("me", SECRET) as options:
        filesystem = fsspec.filesystem("s3", **dict(options))
        folder = tmp_path_factory.mktemp("packed")
        files = files_of(photos)
        for path in (write_zip(folder / "p.zip", files), write_tar(folder / "p.tar", files)):
            filesystem.put(str(path), f"bucket/{path.name}")
        for number in range(3):
            path = write_tar(folder / f"s-{number}.tar", files[number * 30 : number * 30 + 30])
            filesystem.put(str(path), f"bucket/shards/{path.name}")
        filesystem.put(str(photos), "bucket/photos", recursive=True)
        yield json.dumps(options)


def test_braces():
    assert expand_braces("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert expand_braces("plain") == ["plain"]
    with pytest.raises(UserError, match="stands for 10,000,001 files"):
        expand_braces("x-{0..10000000}.tar")
    with pytest.raises(UserError, match="stands for 0 files"):
        expand_braces("x-{3..1}.tar")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["photos", "p.zip", "p.tar", "shards/s-{0..2}.tar", "shards/s-*.tar", "shards"])
def test_s3_gives_what_the_folder_gives(store, photos, tmp_path, name):
    wanted = prepared(photos, tmp_path / "folder")
    found = prepared(f"s3://bucket/{name}", tmp_path / "out", storage_options=store)
    assert_same(found, wanted, with_names="shards" not in name)
    assert not any(SECRET.encode() in content for _, content in files_of(tmp_path / "out"))


@pytest.mark.slow
def test_workers_read_from_s3(store, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("trainkit.data.preparation.prepare.SLICE_ITEMS", 8)
    found = prepared("s3://bucket/p.zip", tmp_path / "out", num_proc=2, storage_options=store)
    assert_same(found, prepared(photos, tmp_path / "folder"))


def test_a_fingerprint_of_s3_follows_the_files(store, photos):
    first = open_given("s3://bucket/photos", storage_options=store).fingerprint
    assert open_given("s3://bucket/photos/", storage_options=store).fingerprint == first
    filesystem = fsspec.filesystem("s3", **json.loads(store))
    filesystem.pipe("bucket/photos/a/0000.txt", b"another")
    filesystem.invalidate_cache()
    assert open_given("s3://bucket/photos", storage_options=store).fingerprint != first
    filesystem.put(str(photos / "a/0000.txt"), "bucket/photos/a/0000.txt")


def test_mistakes_with_urls_are_one_line_and_tell_no_secret(store, tmp_path, monkeypatch):
    cases = {
        "s3://bucket/nothing.zip": "--train_data_dir s3://bucket/nothing.zip does not exist; check the address",
        "s3://bucket/nothing": "does not exist",
        "s3://no-such-bucket/x": "does not exist",
        "nope://bucket/x": "--train_data_dir nope://bucket/x cannot be opened .*check the address",
        "memory://bucket/x": "memory://bucket/x is visible to this process only: give --num_proc 1",
    }
    for given, message in cases.items():
        with pytest.raises(UserError, match=message) as raised:
            open_given(given, num_proc=0, storage_options=store)
        assert "\n" not in str(raised.value) and SECRET not in str(raised.value)
    for text in ("{", "[1]", f"'{SECRET}'"):
        with pytest.raises(UserError, match="--storage_options is not a JSON object") as raised:
            open_given("s3://bucket/p.zip", storage_options=text)
        assert SECRET not in str(raised.value)
    assert "storage_options" in SECRET_OPTIONS


def test_libraries_get_a_copy_of_the_storage_options(monkeypatch):
    def greedy(url, **options):
        options["client_kwargs"].clear()
        raise FileNotFoundError

    core = locations.load_package("fsspec.core", "")
    monkeypatch.setattr(core, "url_to_fs", greedy)
    text = read_storage_options('{"client_kwargs": {"region_name": "x"}}')
    with pytest.raises(UserError):
        find_files("s3://bucket/x.zip", text, "--train_data_dir")
    assert json.loads(text) == {"client_kwargs": {"region_name": "x"}}


def test_memory_and_file_urls(photos, tmp_path):
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(photos), "/held/photos", recursive=True)
    wanted = prepared(photos, tmp_path / "folder")
    for number, given in enumerate(["memory://held/photos", f"file://{photos}"]):
        assert_same(prepared(given, tmp_path / str(number)), wanted)
    archive = write_zip(tmp_path / "p.zip", files_of(photos))
    assert_same(prepared(f"file://{archive}", tmp_path / "zip"), wanted)


def test_what_goes_away_meanwhile_is_a_rejected_line(photos, tmp_path):
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(photos), "/going/photos", recursive=True)
    source = open_given("memory://going/photos")
    filesystem.rm("/going/photos/a/0000.png")
    filesystem.pipe("/going/photos/b/0001.jpg", b"")
    preparation = prepare(source, SETTINGS, tmp_path / "out", 1, show_progress=False)
    assert preparation["rejected"] == {"missing": 1, "truncated": 1} and preparation["num_images"] == 28


def test_neither_images_nor_an_archive_beside_them_are_lost(photos, tmp_path):
    write_photos(tmp_path / "mixed", 4)
    write_zip(tmp_path / "mixed/backup.zip", files_of(photos))
    with pytest.raises(UserError, match="holds many image files and backup.zip too"):
        open_given(tmp_path / "mixed")
    with pytest.raises(UserError, match="is none of .zip, .tar"):
        open_given(f"{tmp_path}/mixed/a/*.png")


def test_vectors_beside_images_in_a_folder(photos, tmp_path):
    write_photos(tmp_path / "in", 8)
    for name, content in (
        ("a/0002", np.zeros(5)),
        ("a/0004", np.zeros((1, 4))),
        ("a/0006", np.array([1, 2, 3, np.inf])),
    ):
        np.save(tmp_path / f"in/{name}.npy", content)
    (tmp_path / "in/b/0001.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "in/b/0003.npy").unlink()
    os.truncate(tmp_path / "in/b/0005.npy", 140)
    found = prepared(tmp_path / "in", tmp_path / "out")
    assert found.names == ["a/0000.png", "b/0007.jpg"] and found.rejected == {"bad_vector": 6}
    assert np.array_equal(found.vectors[1], np.load(tmp_path / "in/b/0007.npy").astype(np.float32))


def test_vectors_in_metadata(tmp_path):
    write_photos(tmp_path / "in", 4)
    for path in (tmp_path / "in").rglob("*.npy"):
        path.unlink()
    assert prepared(tmp_path / "in", tmp_path / "none").vectors.shape == (4, 0)
    lines = [{"file_name": "a/0000.png", "embedding": [1, 2.5]}, {"file_name": "b/0001.jpg", "embedding": [3, "x"]}]
    lines += [{"file_name": "a/0002.webp", "embedding": [3, 4]}]
    (tmp_path / "in/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = prepared(tmp_path / "in", tmp_path / "out", vector_column="embedding")
    assert found.vectors.tolist() == [[1, 2.5], [3, 4]] and found.rejected == {"bad_vector": 1}
