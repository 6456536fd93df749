"""Opening prepared images: by number, by crop, from the cache, and what a damaged folder says."""

import dataclasses
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from process_helpers import ScriptRun
from source_files import DataOptions as Options
from source_files import small_units

from trainkit.data.cache import open_or_prepare
from trainkit.data.images.decode import PreparationSettings, decode_image
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation import shards
from trainkit.data.preparation.prepare import prepare
from trainkit.data.sources.folder import ImageFolder
from trainkit.data.sources.hub import HubDataset
from trainkit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """90 PNGs of random pixels, three classes, aspects from 1:1 to 1:2 either way; every third has a caption."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(90):
        sides = (16, 16 + number % 17)
        height, width = sides if number % 2 else sides[::-1]
        path = folder / "abc"[number % 3] / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        if number % 3 == 0:
            path.with_suffix(".txt").write_text(f"caption {number}")
    return folder


@pytest.fixture
def many_batches(monkeypatch):
    """Several shards of several record batches each, as large datasets have."""
    small_units(monkeypatch, 16, 4)
    monkeypatch.setattr(shards, "BATCH_BYTES", 6000)


def prepared(photos: Path, output: Path, settings: PreparationSettings) -> PreparedImages:
    prepare(ImageFolder(photos), settings, output, num_proc=1, show_progress=False)
    return PreparedImages(output)


@pytest.mark.parametrize("bit_depth, image_mode", [(8, "RGB"), (16, "RGB"), (8, "L"), (8, "RGBA")])
def test_gather_gives_what_the_decoder_made(photos, tmp_path, many_batches, bit_depth, image_mode):
    settings = PreparationSettings(12, 16, resize_mode="crop", bit_depth=bit_depth, image_mode=image_mode)
    images = prepared(photos, tmp_path / "out", settings)
    assert len(images) == 90 and len(images.preparation["shards"]) > 2
    assert (images.height, images.width, images.channels) == (12, 16, len(image_mode))
    assert (images.bit_depth, images.image_mode, images.fixed_size) == (bit_depth, image_mode, True)
    indices = np.random.default_rng(0).permutation(90)[:40]
    pixels = images.gather(indices)
    assert pixels.shape == (40, 12, 16, len(image_mode)) and pixels.dtype == f"uint{bit_depth}"
    for name, image in zip(images.sources(indices), pixels, strict=True):
        assert (image == decode_image(photos / name, settings)).all()
    assert images.sources(np.arange(90)) == sorted(images.sources(np.arange(90)))


def test_crops_place_the_window(photos, tmp_path, many_batches):
    settings = PreparationSettings(16, 16)
    images = prepared(photos, tmp_path / "out", settings)
    assert not images.fixed_size
    indices = np.arange(90)[::-1]
    crops = np.random.default_rng(0).random((90, 2))
    crops[0], crops[1] = 0, 1 - 1e-9
    centred, cropped = images.gather(indices), images.gather(indices, crops)
    for position, name in enumerate(images.sources(indices)):
        whole = decode_image(photos / name, settings)
        top = int(crops[position, 0] * (whole.shape[0] - 16 + 1))
        left = int(crops[position, 1] * (whole.shape[1] - 16 + 1))
        assert (cropped[position] == whole[top : top + 16, left : left + 16]).all()
        centre = decode_image(photos / name, dataclasses.replace(settings, resize_mode="crop"))
        assert (centred[position] == centre).all()


def test_labels_texts_and_sources(photos, tmp_path, many_batches):
    images = prepared(photos, tmp_path / "out", PreparationSettings(8, 8, resize_mode="crop"))
    indices = np.array([89, 0, 45, 0])
    assert images.label_names == ["a", "b", "c"]
    assert images.labels(indices).tolist() == [2, 0, 1, 0] and images.labels(indices).dtype == np.int64
    assert images.texts(indices) == ["", "caption 0", "", "caption 0"]
    assert images.sources(indices)[:2] == ["c/089.png", "a/000.png"]


def test_without_labels_and_captions(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    images = prepared(tmp_path, tmp_path / "out", PreparationSettings(8, 8, resize_mode="crop"))
    assert images.label_names is None and images.labels(np.array([0])).tolist() == [-1]
    assert images.texts(np.array([0])) == [""]


def test_indices_outside_are_refused(photos, tmp_path):
    images = prepared(photos, tmp_path / "out", PreparationSettings(8, 8, resize_mode="crop"))
    for wrong in (-1, 90):
        with pytest.raises(IndexError):
            images.gather(np.array([0, wrong]))
    assert images.gather(np.array([], dtype=np.int64)).shape == (0, 8, 8, 3)


def test_another_process_opens_the_files_itself(photos, tmp_path):
    images = prepared(photos, tmp_path / "out", PreparationSettings(8, 8, resize_mode="crop"))
    images.gather(np.arange(90))
    pickled = pickle.dumps(images)
    assert len(pickled) < 1000
    assert (pickle.loads(pickled).gather(np.arange(5)) == images.gather(np.arange(5))).all()


def test_shards_open_only_when_touched(photos, tmp_path, many_batches):
    images = prepared(photos, tmp_path / "out", PreparationSettings(8, 8, resize_mode="crop"))
    assert not images._shards_open
    images.gather(np.array([0]))
    assert len(images._shards_open) == 1


def test_a_damaged_folder_is_a_user_error_naming_the_file(photos, tmp_path):
    output = tmp_path / "out"
    images = prepared(photos, output, PreparationSettings(8, 8, resize_mode="crop"))
    shard = output / images.preparation["shards"][0]["filename"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=f"{shard} is damaged .*; delete it and run the preparation again"):
        PreparedImages(output)
    shard.write_bytes(b"\0" * len(whole))
    with pytest.raises(UserError, match=f"{shard} is damaged"):
        PreparedImages(output).gather(np.array([0]))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard} is damaged .No such file"):
        PreparedImages(output)
    for damage in (None, whole[:-1000]):
        if damage is not None:
            shard.write_bytes(damage)
        prepare(ImageFolder(photos), images.settings, output, show_progress=False)
        assert shard.read_bytes() == whole and len(PreparedImages(output)) == 90
    (output / "preparation.json").unlink()
    with pytest.raises(UserError, match="not a complete prepared dataset"):
        PreparedImages(output)


def test_a_raw_folder_is_prepared_once_into_the_cache(photos, tmp_path, capsys):
    options = Options(train_data_dir=str(photos), cache_dir=str(tmp_path / "cache"), resolution="16")
    first = open_or_prepare(options)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"preparing 90 files of {photos} into {tmp_path}/cache/prepared/{photos.name}-")
    assert len(first) == 90 and first.height == 16
    stamp = (first.folder / "preparation.json").stat().st_mtime_ns
    second = open_or_prepare(options)
    assert capsys.readouterr().out.splitlines() == [f"prepared images: {first.folder}, 90 images"]
    assert second.folder == first.folder and second.fingerprint == first.fingerprint
    assert (first.folder / "preparation.json").stat().st_mtime_ns == stamp
    other = open_or_prepare(dataclasses.replace(options, center_crop=True))
    assert other.folder != first.folder and other.fixed_size


def test_resolution_is_64_unless_told(photos, tmp_path):
    images = open_or_prepare(Options(train_data_dir=str(photos), cache_dir=str(tmp_path)))
    assert (images.height, images.width) == (64, 64)


def test_changed_files_are_prepared_anew(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    options = Options(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"), resolution="8")
    before = open_or_prepare(options)
    (folder / "a/000.png").unlink()
    assert len(open_or_prepare(options)) == 89
    (folder / "a/003.txt").write_text("another caption")
    assert "another caption" in open_or_prepare(options).texts(np.arange(89))
    assert len(PreparedImages(before.folder)) == 90


def test_a_damaged_cache_entry_mends_itself(photos, tmp_path, many_batches):
    options = Options(train_data_dir=str(photos), cache_dir=str(tmp_path), resolution="8", num_proc=1)
    images = open_or_prepare(options)
    paths = [images.folder / shard["filename"] for shard in images.preparation["shards"]]
    whole = [path.read_bytes() for path in paths]
    paths[0].unlink()
    paths[1].write_bytes(whole[1][:-500])
    (images.folder / "preparation.json").unlink()
    assert len(open_or_prepare(options)) == 90
    assert [path.read_bytes() for path in paths] == whole


@pytest.mark.slow
def test_other_ranks_wait_in_silence(photos, tmp_path):
    script = (
        "from source_files import DataOptions\nfrom trainkit.data.cache import open_or_prepare\n"
        f"options = DataOptions(train_data_dir={str(photos)!r}, cache_dir={str(tmp_path)!r}, num_proc=1)\n"
        "assert len(open_or_prepare(options)) == 90"
    )
    here = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    runs = [ScriptRun("-c", code=script, environment=here | {"LOCAL_RANK": str(rank)}) for rank in range(3)]
    done = [run.wait(timeout=60) for run in runs]
    said = [process.stdout + process.stderr for process in done]
    assert [process.returncode for process in done] == [0, 0, 0], said
    assert "prepared images" in said[0] and said[1:] == ["", ""]
    assert len(list((tmp_path / "prepared").iterdir())) == 1


def test_a_prepared_folder_is_opened_as_it_is(photos, tmp_path, capsys):
    output = tmp_path / "out"
    prepared(photos, output, PreparationSettings(12, 16, resize_mode="crop"))
    cache = str(tmp_path / "cache")
    for options in (
        Options(train_data_dir=str(output), cache_dir=cache),
        Options(dataset_name=str(output), cache_dir=cache),
        Options(train_data_dir=str(output), resolution="12x16", center_crop=True),
    ):
        assert open_or_prepare(options).folder == output
    assert not (tmp_path / "cache").exists() and capsys.readouterr().out == ""
    for contradiction, message in {
        "resolution": ("64", "--resolution 64, but --train_data_dir .*out was prepared at 12x16"),
        "image_mode": ("L", "--image_mode L, but --train_data_dir .*out holds RGB: leave the flag out"),
        "preserve_input_precision": (True, "was prepared with 8 bits"),
    }.items():
        with pytest.raises(UserError, match=message[1]):
            open_or_prepare(Options(train_data_dir=str(output), **{contradiction: message[0]}))


def test_an_unfinished_folder_is_told_from_one_of_images(photos, tmp_path):
    prepared(photos, tmp_path / "out", PreparationSettings(8, 8))
    (tmp_path / "out/preparation.json").unlink()
    with pytest.raises(UserError, match="--train_data_dir .*out is an unfinished prepared dataset"):
        open_or_prepare(Options(train_data_dir=str(tmp_path / "out")))


def test_threads_may_gather_at_once(photos, tmp_path, many_batches):
    images = prepared(photos, tmp_path / "out", PreparationSettings(8, 8, resize_mode="crop"))
    expected = PreparedImages(images.folder).gather(np.arange(90))
    orders = [np.random.default_rng(seed).permutation(90) for seed in range(40)]
    with ThreadPoolExecutor(8) as threads:
        for order, gathered in zip(orders, threads.map(images.gather, orders), strict=True):
            assert (gathered == expected[order]).all()


def test_a_source_must_be_given():
    with pytest.raises(UserError, match="--train_data_dir FOLDER or --dataset_name NAME"):
        open_or_prepare(Options())


@pytest.mark.slow
def test_a_saved_dataset_becomes_prepared_images(tmp_path, many_batches):
    images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(40)] + [None]
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"]), "text": datasets.Value("string")}
    )
    columns = {"img": images, "label": [0, 1] * 20 + [0], "text": [f"no {number}" for number in range(41)]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    for options in (Options(dataset_name=str(tmp_path / "saved")), Options(train_data_dir=str(tmp_path / "saved"))):
        options = dataclasses.replace(options, cache_dir=str(tmp_path / "cache"), resolution="8", center_crop=True)
        prepared_images = open_or_prepare(options)
        assert prepared_images.gather(np.array([7, 30]))[:, 0, 0, 0].tolist() == [7, 30]
        assert prepared_images.labels(np.array([7, 30])).tolist() == [1, 0]
        assert prepared_images.texts(np.array([7])) == ["no 7"]
        assert prepared_images.preparation["rejected"] == {"missing": 1}
    assert len(list((tmp_path / "cache/prepared").iterdir())) == 1
    settings = PreparationSettings(8, 8, resize_mode="crop")
    prepare(HubDataset(str(tmp_path / "saved")), settings, tmp_path / "two", num_proc=2, show_progress=False)
    for path in prepared_images.folder.glob("data-*"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_importing_needs_neither_torch_nor_datasets():
    script = "import sys, trainkit.data.cache; assert not {'torch', 'datasets', 'pandas'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_gathering_is_fast(tmp_path):
    """A floor far below what an idle core does (about 400,000 images/s), to notice per-item Arrow objects."""
    generator = np.random.default_rng(0)
    for number in range(300):
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{number}.bmp")
    images = prepared(tmp_path, tmp_path / "out", PreparationSettings(64, 64, resize_mode="crop"))
    batches = generator.integers(0, 300, (100, 128))
    images.gather(batches[0])
    started = time.process_time()
    for batch in batches:
        images.gather(batch)
    assert batches.size / (time.process_time() - started) > 60_000
