"""Preparing to object stores: the same bytes as in a folder, resumable, harmless when done twice at once."""

import json
import os
import signal
import time
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
from conftest import fresh_s3
from PIL import Image
from process_helpers import ScriptRun, run_forked

from trainkit.data.files import RemotePath, location, sizes
from trainkit.data.images.decode import PreparationSettings
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation import prepare as prepare_module
from trainkit.data.preparation import shards
from trainkit.data.preparation.filtering import NO_FILTERS, FilterSettings
from trainkit.data.preparation.prepare import prepare
from trainkit.data.sources import records
from trainkit.data.sources.folder import ImageFolder
from trainkit.errors import UserError

SETTINGS = PreparationSettings(16, 16, resize_mode="crop")
FOLDERS = ("", "validation", ".units")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(3000):
        pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.bmp")
    (folder / "none.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def local(photos, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("local") / "set"
    prepare(ImageFolder(photos), SETTINGS, output, num_proc=1, show_progress=False)
    return output


@pytest.fixture(scope="module")
def store():
    """JSON of `--storage_options` for an S3 server of this machine, which has a bucket."""
    with fresh_s3() as options:
        yield json.dumps(options)


@pytest.fixture
def memory(monkeypatch):
    """A URL in the memory of this process, which is forgotten afterwards."""
    monkeypatch.setattr(records, "UNIT_ITEMS", 256)
    yield "memory://store/set"
    fsspec.filesystem("memory").rm("/store", recursive=True)


def contents(folder) -> dict[str, bytes]:
    """What a reader sees: all but the mark that the place is ours."""
    if isinstance(folder, Path):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    fs, key = folder.connect()
    return {name: fs.cat_file(f"{key}/{name}") for name in sizes(folder) if name != ".lock"}


def command(photos: Path, url: str, options: str, cache: Path, *more) -> list[str]:
    script = ["prepare_dataset.py", "--train_data_dir", photos, "--output_dir", url]
    script += ["--storage_options", options, "--cache_dir", cache, "--resolution", "16", "--center_crop"]
    script += ["--no_contact_sheet", *more]
    return list(map(str, script))


@pytest.mark.slow
def test_s3_holds_the_same_bytes_and_datasets_opens_it(photos, local, store, tmp_path):
    done = run_forked(*command(photos, "s3://bucket/whole", store, tmp_path, "--num_proc", 2))
    assert "3,000 images, 1 rejected" in done.stdout, done.stderr
    assert contents(location("s3://bucket/whole", store)) == contents(local)
    images = datasets.load_from_disk("s3://bucket/whole", storage_options=json.loads(store))
    assert len(images) == 3000 and images[2999]["source"] == "2999.bmp"
    ours, theirs = PreparedImages("s3://bucket/whole", storage_options=store), PreparedImages(local)
    assert (ours.gather(np.arange(0, 3000, 99)) == theirs.gather(np.arange(0, 3000, 99))).all()


@pytest.mark.slow(9)
def test_killed_in_the_middle_s3_keeps_whole_shards_that_are_not_made_again(photos, local, store, tmp_path):
    target = location("s3://bucket/killed", store)
    arguments = command(photos, str(target), store, tmp_path, "--num_proc", 1)
    [process] = ScriptRun(*arguments).ranks
    while process.poll() is None and not any(name.endswith(".arrow") for name in sizes(target)):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {name: content for name, content in contents(target).items() if name.endswith(".arrow")}
    assert kept.items() < contents(local).items() and "preparation.json" not in sizes(target)
    done = run_forked(*arguments)
    prepared = int(done.stdout.partition("prepared ")[2].partition(" files")[0].replace(",", ""))
    assert prepared <= 3001 - 1024 and contents(target) == contents(local)
    assert "is up to date" in run_forked(*arguments).stdout


def count_decoded(monkeypatch) -> list:
    decoded, decode = [], shards.decode_image
    monkeypatch.setattr(shards, "decode_image", lambda *given: (decoded.append(given[0]), decode(*given))[1])
    return decoded


@pytest.mark.slow
def test_what_is_there_is_not_made_again(photos, memory, monkeypatch):
    first = prepare(ImageFolder(photos), SETTINGS, memory, num_proc=1, show_progress=False)
    target = location(memory)
    fs, key = target.connect()
    fs.rm(f"{key}/preparation.json")
    fs.rm(f"{key}/{first['shards'][1]['filename']}")
    decoded = count_decoded(monkeypatch)
    assert prepare(ImageFolder(photos), SETTINGS, memory, num_proc=1, show_progress=False) == first
    assert len(decoded) == first["shards"][1]["num_rows"]
    assert "work" not in sizes(target)


@pytest.mark.slow
def test_other_settings_replace_the_set_but_leave_the_work_of_another_run(photos, memory):
    first = prepare(ImageFolder(photos), SETTINGS, memory, num_proc=1, show_progress=False)
    target = location(memory)
    fs, key = target.connect()
    fs.pipe_file(f"{key}/data-0123456789abcdef.arrow", b"of a run on another machine")
    prepare(ImageFolder(photos), PreparationSettings(8, 8), memory, num_proc=1, show_progress=False, overwrite=True)
    names = sizes(target).keys()
    assert not names & {shard["filename"] for shard in first["shards"]}
    assert "data-0123456789abcdef.arrow" in names and PreparedImages(memory).height == 8


def test_what_deduplication_kept_of_a_former_set_goes_with_it(tmp_path, memory):
    for number in range(40):
        Image.new("L", (16, 16), 5 * (number % 35)).save(tmp_path / f"{number:02d}.png")
    filters = FilterSettings("exact", validation_fraction=0.3)

    def names(output, filters=filters) -> list[set[str]]:
        source = ImageFolder(tmp_path)
        prepare(source, SETTINGS, output, num_proc=1, show_progress=False, filters=filters, overwrite=True)
        found = [sizes(location(output) / name if name else location(output)).keys() for name in FOLDERS]
        return [{name for name in part if name.endswith(".arrow")} for part in found]

    first = names(memory)
    (tmp_path / "03.png").unlink()  # its duplicate comes back, others are still repeated
    (tmp_path / "04.png").rename(tmp_path / "z.png")
    second = names(memory)
    assert second != first and second == names(str(tmp_path / "local"))
    assert names(memory, NO_FILTERS)[1:] == [set(), set()]


@pytest.mark.slow
def test_another_run_that_was_first_with_a_shard_is_no_harm(photos, memory, monkeypatch):
    """Both slice and join; the first deletes its slices, also those that the second was to join."""
    join = shards.ShardWriter.join
    monkeypatch.setattr(shards.ShardWriter, "join", lambda writer, job: (join(writer, job), join(writer, job)))
    done = prepare(ImageFolder(photos), SETTINGS, memory, num_proc=1, show_progress=False)
    assert done["num_images"] == 3000


def test_mistakes_are_one_line(photos, store):
    fsspec.filesystem("s3", **json.loads(store)).pipe_file("bucket/full/thesis.txt", b"mine")
    for url, options, message in [
        ("s3://bucket/full", store, "--output_dir s3://bucket/full holds other files"),
        ("s3://nowhere/set", store, "--output_dir s3://nowhere/set cannot be written"),
        ("s3://bucket/set", "{endpoint", "--storage_options is not a JSON object"),
        ("nosuch://bucket/set", "{}", "nosuch://bucket/set is not a URL that fsspec knows"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            prepare(ImageFolder(photos), SETTINGS, location(url, options), show_progress=False)
        assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_damaged_object_is_named(photos, memory):
    done = prepare(ImageFolder(photos), SETTINGS, memory, num_proc=1, show_progress=False)
    fs, key = location(memory).connect()
    name = done["shards"][0]["filename"]
    fs.pipe_file(f"{key}/{name}", fs.cat_file(f"{key}/{name}")[:-1])
    with pytest.raises(UserError, match=f"{name} is damaged .*bytes instead of"):
        PreparedImages(memory)


def test_locations_are_told_apart(tmp_path):
    assert (
        location("file:///a/b") == Path("/a/b") and location(tmp_path) == tmp_path and location("a/b") == Path("a/b")
    )
    remote = location("s3://b/c", '{"key": "k"}') / "d.arrow"
    assert isinstance(remote, RemotePath) and (remote.name, remote.stem, str(remote.parent)) == (
        "d.arrow",
        "d",
        "s3://b/c",
    )
    assert prepare_module.location(remote) is remote
