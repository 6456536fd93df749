"""A prepared dataset at a URL: trained on block by block, or copied once."""

import errno

import numpy as np
import pytest
from filelock import FileLock
from training_helpers import losses, run_in_process, tiny_run

from trainkit.data import files
from trainkit.data.cache import local_copy
from trainkit.data.files import location
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.order import WINDOW_BLOCKS, SampleOrder
from trainkit.data.preparation.filtering import FilterSettings
from trainkit.data.preparation.prepare import prepare
from trainkit.data.settings import PreparationSettings
from trainkit.data.sources.folder import ImageFolder
from trainkit.errors import UserError

URL = "memory://bucket/prepared"
SETTINGS = PreparationSettings(16, 16)


@pytest.fixture(scope="module")
def prepared(image_folder, tmp_path_factory):
    """The tiny images, prepared in a folder and at a URL, in shards of a few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainkit.data.sources.records.UNIT_ITEMS", 4)
        folder = tmp_path_factory.mktemp("prepared") / "set"
        for output in (folder, location(URL)):
            prepare(ImageFolder(image_folder), SETTINGS, output, num_proc=1, show_progress=False)
    assert len(PreparedImages(folder)._shards) > 5
    return folder


@pytest.fixture
def fetched(monkeypatch):
    """Names of the objects that are opened at the URL, in order."""
    names, original = [], files.open_stream

    def counted(path):
        names.append(path.name)
        return original(path)

    monkeypatch.setattr("trainkit.data.loading.dataset.open_stream", counted)
    return names


@pytest.fixture
def train(image_folder, tiny_unet, cache_dir, tmp_path, monkeypatch):

    def call(name, **flags):
        flags = {"max_train_steps": 6, "shuffle_block_size": 1} | flags
        arguments = tiny_run(image_folder, tiny_unet, tmp_path / "cache", tmp_path / name, **flags)
        run_in_process(monkeypatch, "train_unconditional", arguments)
        return tmp_path / name

    return call


@pytest.mark.slow
def test_streaming_is_the_run_on_the_folder_and_goes_on_after_a_stop(prepared, train, fetched, tmp_path):
    local = train("local", train_data_dir=prepared)
    streamed = train("streamed", train_data_dir=URL, streaming=True, max_train_steps=3, lr_scheduler="constant")
    train("streamed", train_data_dir=URL, streaming=True, resume_from_checkpoint="latest", lr_scheduler="constant")
    whole = train("constant", train_data_dir=prepared, lr_scheduler="constant")
    assert losses(streamed) == losses(whole) and losses(local) != losses(whole)
    assert fetched and not (tmp_path / "cache").exists()  # no copy


def test_only_what_is_wanted_stays_in_memory(prepared, fetched):
    images = PreparedImages(location(URL))
    order = SampleOrder(len(images), seed=0, block_size=1)
    local, held = PreparedImages(prepared), []
    for epoch_start in (0, len(images)):
        position = epoch_start
        while position < epoch_start + len(images):
            first, end = order.window(position)
            images.read_ahead(order.ranges(first, end))
            indices = order.indices(np.arange(first, end))
            crops = np.zeros((len(indices), 2))
            assert np.array_equal(images.gather(indices, crops), local.gather(indices, crops))
            held.append(len(images._shards_open))
            position = end
    assert max(held) <= 2 * WINDOW_BLOCKS
    images.read_ahead([])
    images.read_ahead([])
    assert not images._shards_open


@pytest.mark.slow
def test_without_streaming_a_copy_is_made_once(prepared, train, tmp_path, capsys):
    local, copied = train("local", train_data_dir=prepared), train("copied", train_data_dir=URL)
    assert losses(copied) == losses(local) and "(once; --streaming reads without a copy)" in capsys.readouterr().out
    train("again", train_data_dir=URL)
    assert "copying" not in capsys.readouterr().out


def test_a_copy_that_was_cut_short_is_completed(prepared, tmp_path, capsys):
    copy = local_copy(location(URL), tmp_path)
    shard = next(copy.glob("data-*.arrow"))
    whole = shard.read_bytes()
    (copy / "preparation.json").unlink()
    shard.write_bytes(whole[:100])
    capsys.readouterr()
    assert local_copy(location(URL), tmp_path) == copy and shard.read_bytes() == whole
    assert "copying 1 shard of" in capsys.readouterr().out


def test_a_complete_copy_that_only_its_owner_can_write_is_read(prepared, tmp_path, monkeypatch):
    copy = local_copy(location(URL), tmp_path)

    def refused(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refused)
    assert local_copy(location(URL), tmp_path) == copy


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"train_data_dir": URL, "shuffle_block_size": 0},
            "--streaming fetches whole shards: add --shuffle_block_size",
        ),
        ({"train_data_dir": "memory://bucket/nothing"}, "--streaming: .* is not a prepared dataset"),
        ({}, "--streaming reads a prepared dataset from a URL"),
    ],
)
def test_what_cannot_be_streamed_is_refused(prepared, train, flags, message):
    with pytest.raises(UserError, match=message):
        train("out", streaming=True, **flags)


def test_a_store_that_fails_is_one_line(prepared, monkeypatch):
    images = PreparedImages(location(URL))

    def fail(path):
        raise OSError(5, "connection reset", str(path))

    monkeypatch.setattr("trainkit.data.loading.dataset.open_stream", fail)
    with pytest.raises(UserError, match="cannot be fetched .*connection reset"):
        images.gather(np.array([0]))


@pytest.mark.slow
def test_the_held_out_part_at_the_url_is_taken(image_folder, train):
    filters = FilterSettings(validation_fraction=0.3)
    split = location("memory://bucket/split")
    prepare(ImageFolder(image_folder), SETTINGS, split, num_proc=1, show_progress=False, filters=filters)
    flags = {"train_data_dir": str(split), "validation_data_dir": f"{split}/validation", "validation_steps": 3}
    output = train("split", streaming=True, **flags)
    assert "validation_loss" in (output / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="is part of --train_data_dir"):
        train("same", streaming=True, **flags | {"validation_data_dir": f"{split}/"})
