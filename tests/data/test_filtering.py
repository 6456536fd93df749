"""Duplicates, the held-out part, statistics, and wrong data: what stays of what could be read."""

import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image
from source_files import contents, small_units
from test_prepare import SETTINGS, Stopped, count_decoded, run, write_images

from trainkit.data.format import read_preparation
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation.filtering import KEPT, FilterSettings, exact_duplicates, near_duplicates, near_pairs
from trainkit.data.preparation.prepare import prepare
from trainkit.data.preparation.shards import ShardWriter, open_stream
from trainkit.data.settings import PreparationSettings
from trainkit.data.sources.folder import ImageFolder
from trainkit.errors import UserError

EXACT, NEAR = FilterSettings("exact"), FilterSettings("near")


def prepared(folder: Path, output: Path, filters: FilterSettings, settings=SETTINGS, **options) -> dict:
    options = {"num_proc": 1, "show_progress": False} | options
    return prepare(ImageFolder(folder), settings, output, filters=filters, **options)


def names(folder: Path) -> list[str]:
    return list(datasets.load_from_disk(str(folder))["source"])


def rejected(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]


def photograph(seed: int, side: int = 96) -> Image.Image:
    """A smooth picture of its own."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def units_of_32(monkeypatch):
    small_units(monkeypatch, 32)


@pytest.fixture
def repeated(tmp_path) -> Path:
    """300 images in units of about 32; six are others saved again."""
    write_images(tmp_path / "photos/a", 150)
    write_images(tmp_path / "photos/b", 150, start=150)
    for copy, original in {"a/x0.png": "a/00000.png", "a/x1.bmp": "a/00002.png", "b/x2.png": "a/00000.png"}.items():
        Image.open(tmp_path / "photos" / original).save(tmp_path / "photos" / copy)
    for number in (170, 200, 298):
        (tmp_path / f"photos/b/y{number}.png").write_bytes((tmp_path / f"photos/b/00{number}.png").read_bytes())
    return tmp_path / "photos"


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7])
def test_the_search_finds_just_what_comparing_all_with_all_finds(distance):
    generator = np.random.default_rng(distance)
    hashes = generator.integers(0, 2**64, 1500, dtype=np.uint64)
    for position in range(0, 1400, 7):  # plant some at every distance
        flips = generator.choice(64, position % 10, replace=False)
        hashes[position + 1] = hashes[position] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64))
    hashes = np.unique(hashes)
    generator.shuffle(hashes)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    later, earlier = np.nonzero(np.tril(apart <= distance, k=-1))
    assert near_pairs(hashes, distance).tolist() == np.stack([later, earlier], axis=1).tolist()
    assert distance == 0 or len(later) > 10


def test_the_first_stays_and_no_chain_drops_what_is_near_nothing_that_stays():
    chain = np.array([0b0000, 0b0011, 0b1111, 0b0000, 0b1111_1111 << 20], dtype=np.uint64)
    assert near_duplicates(chain, 2).tolist() == [KEPT, 0, KEPT, 0, KEPT]
    assert near_duplicates(chain, 4).tolist() == [KEPT, 0, 0, 0, KEPT]
    assert near_duplicates(chain[:0], 4).tolist() == []
    pairs = np.array([[1, 2], [1, 3], [1, 2], [0, 2], [1, 3], [1, 2]], dtype=np.uint64)
    assert exact_duplicates(pairs).tolist() == [KEPT, KEPT, 0, KEPT, 1, 0]


@pytest.mark.slow
def test_the_same_photo_saved_twice_goes_and_the_first_stays(repeated, tmp_path):
    done = run(repeated, tmp_path / "out", "--deduplicate", "exact")
    assert done.returncode == 0 and "300 images, 6 rejected (6 duplicate" in done.stdout, done.stderr
    assert names(tmp_path / "out") == [f"{'ab'[number // 150]}/{number:05d}." + "png jpg".split()[number % 2]
                                       for number in range(300)]  # fmt: skip
    lines = {line["source"]: line for line in rejected(tmp_path / "out")}
    assert {name: line["repeats"] for name, line in lines.items()} == {
        "a/x0.png": "a/00000.png", "a/x1.bmp": "a/00002.png", "b/x2.png": "a/00000.png",
        "b/y170.png": "b/00170.png", "b/y200.png": "b/00200.png", "b/y298.png": "b/00298.png",
    }  # fmt: skip
    assert lines["a/x0.png"]["message"] == "the same pixels as a/00000.png"
    assert lines["b/x2.png"]["message"].endswith("which has another class: a")
    preparation = read_preparation(tmp_path / "out")
    assert preparation["classes"] == {"a": 150, "b": 150} and preparation["rejected"] == {"duplicate": 6}
    assert len(PreparedImages(tmp_path / "out")) == 300


@pytest.mark.slow
@pytest.mark.parametrize("filters", [EXACT, FilterSettings("exact", validation_fraction=0.3)], ids=["", "split"])
def test_neither_processes_nor_a_kill_nor_history_change_the_bytes(
    repeated, tmp_path, units_of_32, monkeypatch, filters
):
    prepared(repeated, tmp_path / "fresh", filters)
    prepared(repeated, tmp_path / "two", filters, num_proc=2)
    assert contents(tmp_path / "fresh") == contents(tmp_path / "two")

    write_rows, written = ShardWriter.write_rows, []

    def dying(self, path, *arguments, **keywords):
        written.append(path)
        if len(written) % 4 == 0:
            raise Stopped
        write_rows(self, path, *arguments, **keywords)

    with monkeypatch.context() as killed:
        killed.setattr(ShardWriter, "write_rows", dying)
        for _ in range(60):
            try:
                prepared(repeated, tmp_path / "killed", filters)
                break
            except Stopped:
                assert read_preparation(tmp_path / "killed") is None
    assert len(written) > 20 and contents(tmp_path / "fresh") == contents(tmp_path / "killed")

    moved = repeated / "a/00000.png"
    content, times = moved.read_bytes(), moved.stat()
    moved.unlink()  # its copies take its place
    prepared(repeated, tmp_path / "killed", filters)
    assert "a/x0.png" not in {line["source"] for line in rejected(tmp_path / "killed")}
    moved.write_bytes(content)
    os.utime(moved, ns=(times.st_atime_ns, times.st_mtime_ns))
    prepared(repeated, tmp_path / "killed", filters)
    assert contents(tmp_path / "fresh") == contents(tmp_path / "killed")


@pytest.mark.slow
def test_a_duplicate_comes_and_goes_without_its_unit_being_decoded(repeated, tmp_path, units_of_32, monkeypatch):
    prepared(repeated, tmp_path / "out", EXACT)
    first = repeated / "b/00298.png"
    (repeated / "0.png").write_bytes(first.read_bytes())  # sorts before all: now that one stays
    (repeated / "0.png").rename(repeated / "a/0.png")
    decoded = count_decoded(monkeypatch)
    prepared(repeated, tmp_path / "out", EXACT)
    assert "b/00298.png" not in names(tmp_path / "out") and "a/0.png" in names(tmp_path / "out")
    assert decoded and all(path.parent.name == "a" for path in decoded) and len(decoded) <= 4 * 32

    (repeated / "a/0.png").unlink()
    decoded.clear()
    prepared(repeated, tmp_path / "out", EXACT)
    assert "b/00298.png" in names(tmp_path / "out") and "b/y298.png" not in names(tmp_path / "out")
    assert all(path.parent.name == "a" for path in decoded)
    prepared(repeated, tmp_path / "fresh", EXACT)
    assert contents(tmp_path / "fresh") == contents(tmp_path / "out")


def test_no_image_is_stored_twice(repeated, tmp_path, units_of_32):
    def total(folder):
        streams = [open_stream(path) for path in folder.rglob("*.arrow")]
        return sum(batch.num_rows for stream in streams if "image" in stream.schema.names for batch in stream)

    prepared(repeated, tmp_path / "out", FilterSettings("exact", validation_fraction=0.2))
    assert total(tmp_path / "out") == 306


def test_near_duplicates_are_the_same_picture_saved_smaller_or_worse_or_tinted(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(40):
        photograph(seed).save(folder / f"{seed:02d}.png")
    photograph(3).save(folder / "03_worse.jpg", quality=40)
    photograph(5).resize((60, 60)).save(folder / "05_smaller.png")
    tinted = (np.asarray(photograph(7)) * [1.0, 0.9, 0.8]).astype(np.uint8)
    Image.fromarray(tinted).save(folder / "07_tinted.png")
    settings = PreparationSettings(32, 32, resize_mode="crop")
    assert prepared(folder, tmp_path / "exact", EXACT, settings)["num_images"] == 43
    assert prepared(folder, tmp_path / "out", NEAR, settings)["num_images"] == 40
    found = {line["source"]: line["repeats"] for line in rejected(tmp_path / "out")}
    assert found == {"03_worse.jpg": "03.png", "05_smaller.png": "05.png", "07_tinted.png": "07.png"}
    assert all(re.search(r"looks like 0\d\.png: \d of 64 bits differ", line["message"])
               for line in rejected(tmp_path / "out"))  # fmt: skip
    split = FilterSettings("near", validation_fraction=0.5)
    prepared(folder, tmp_path / "split", split, settings)
    both = names(tmp_path / "split") + names(tmp_path / "split/validation")
    assert len(both) == 40 and not found.keys() & set(both), "no near duplicate on the other side"


def test_another_distance_decodes_nothing(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for seed in range(10):
        photograph(seed).save(tmp_path / f"photos/{seed}.png")
    prepared(tmp_path / "photos", tmp_path / "out", NEAR)
    decoded = count_decoded(monkeypatch)
    done = prepared(tmp_path / "photos", tmp_path / "out", FilterSettings("near", 16), overwrite=True)
    assert not decoded and done["filters"]["near_distance"] == 16


def test_deep_grey_transparent_and_uncropped_images_have_hashes_too(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(6):
        photograph(seed).resize((40 + seed, 30)).convert("RGBA").save(folder / f"{seed}.png")
        (folder / f"{seed}-again.png").write_bytes((folder / f"{seed}.png").read_bytes())
    for mode, depth in (("L", 8), ("RGB", 16), ("RGBA", 8), ("L", 16)):
        settings = PreparationSettings(16, 16, image_mode=mode, bit_depth=depth)
        for filters in (EXACT, NEAR):
            output = tmp_path / f"{mode}{depth}{filters.deduplicate}"
            assert prepared(folder, output, filters, settings)["num_images"] == 6
            assert len(PreparedImages(output).gather(np.arange(6))) == 6


@pytest.mark.slow
def test_an_image_never_changes_sides(repeated, tmp_path):
    filters = FilterSettings(validation_fraction=0.2)
    prepared(repeated, tmp_path / "out", filters)
    train, held_out = set(names(tmp_path / "out")), set(names(tmp_path / "out/validation"))
    assert len(train) + len(held_out) == 306 and not train & held_out and 40 <= len(held_out) <= 80
    for copy, original in {"a/x1.bmp": "a/00002.png", "b/x2.png": "a/00000.png"}.items():
        assert (copy in held_out) == (original in held_out), "the same pixels are on the same side"

    write_images(repeated / "a", 100, start=5000)  # the set grows, and every file gets another name
    (repeated / "a").rename(repeated / "c")
    prepared(repeated, tmp_path / "grown", filters)
    now = set(names(tmp_path / "grown/validation"))
    assert {name.replace("a/", "c/") for name in held_out} == {name for name in now if not name.startswith("c/05")}

    classes = [read_preparation(folder)["classes"] for folder in (tmp_path / "out", tmp_path / "out/validation")]
    assert {name: classes[0][name] + classes[1][name] for name in "ab"} == {"a": 152, "b": 154}


def test_training_takes_the_held_out_part(repeated, tmp_path):
    from trainkit.training.validation import open_validation_images

    prepared(repeated, tmp_path / "out", FilterSettings(validation_fraction=0.2))
    images = PreparedImages(tmp_path / "out")
    options = SimpleNamespace(
        train_data_dir=str(tmp_path / "out"), dataset_name=None, validation_data_dir=str(tmp_path / "out/validation"),
        validation_split=None,
        validation_steps=None, validation_images=8, storage_options=None,
    )  # fmt: skip
    held_out = open_validation_images(options, images)
    assert len(held_out) + len(images) == 306 and held_out.gather(np.arange(4)).shape == (4, 16, 16, 3)


def test_a_split_that_leaves_one_side_empty_says_so(tmp_path):
    write_images(tmp_path / "photos", 3)
    for fraction, fix in ((0.0001, "larger"), (0.9999, "smaller")):
        with pytest.raises(UserError, match=f"--validation_fraction {fraction} of 3 images .* give a {fix} fraction"):
            prepared(tmp_path / "photos", tmp_path / fix, FilterSettings(validation_fraction=fraction))


def test_the_split_is_mended_when_it_is_damaged(repeated, tmp_path):
    filters = FilterSettings("exact", validation_fraction=0.2)
    prepared(repeated, tmp_path / "out", filters)
    before = contents(tmp_path / "out")
    shard = next((tmp_path / "out/validation").glob("data-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:1000])
    prepared(repeated, tmp_path / "out", filters)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("mode, depth", [("RGB", 8), ("L", 8), ("RGBA", 8), ("RGB", 16)])
def test_mean_and_std_are_exact_and_of_what_stays(repeated, tmp_path, units_of_32, mode, depth):
    settings = PreparationSettings(16, 16, resize_mode="crop", image_mode=mode, bit_depth=depth)
    done = prepared(repeated, tmp_path / "out", EXACT, settings)
    images = PreparedImages(tmp_path / "out")
    pixels = images.gather(np.arange(len(images))).reshape(-1, settings.channels) / (2.0**depth - 1)
    assert len(images) == 300 and done["pixels"]["num_pixels"] == len(pixels)
    np.testing.assert_allclose(done["pixels"]["mean"], pixels.mean(axis=0), atol=1e-7)
    np.testing.assert_allclose(done["pixels"]["std"], pixels.std(axis=0), atol=1e-7)


def test_a_run_on_wrong_data_stops_early(tmp_path, monkeypatch):
    monkeypatch.setattr("trainkit.data.preparation.prepare.EARLY_FILES", 200)
    write_images(tmp_path / "photos", 100)
    for number in range(500):
        (tmp_path / f"photos/bad{number:03d}.jpg").write_text("<html>not found</html>")
    decoded = count_decoded(monkeypatch)
    with pytest.raises(UserError) as raised:
        prepared(tmp_path / "photos", tmp_path / "out", FilterSettings(), max_rejected_fraction=0.3)
    message = str(raised.value)
    assert re.match(r"\d+ of the first 256 files were rejected \(\d+ web_page\), more than --max_rej", message)
    assert "bad000.jpg (web_page" in message and "\n" not in message and len(decoded) == 256
    decoded.clear()
    done = prepared(tmp_path / "photos", tmp_path / "out", FilterSettings(), max_rejected_fraction=0.9)
    assert done["num_images"] == 100 and len(decoded) == 600 - 256, "what was done stays"


@pytest.mark.slow
def test_a_small_set_is_judged_when_all_is_seen(tmp_path):
    write_images(tmp_path / "photos", 8)
    for number in range(2):
        (tmp_path / f"photos/bad{number}.jpg").write_text("no")
    done = run(tmp_path / "photos", tmp_path / "out", "--max_rejected_fraction", "0.1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "2 of 10 files were rejected (2 not_an_image)" in done.stderr and "rejected.jsonl" in done.stderr
    assert read_preparation(tmp_path / "out") is None
    assert run(tmp_path / "photos", tmp_path / "out", "--max_rejected_fraction", "0.2").returncode == 0


def test_duplicates_are_not_wrong_data(tmp_path):
    buffer = io.BytesIO()
    photograph(0).save(buffer, "PNG")
    (tmp_path / "photos").mkdir()
    for number in range(20):
        (tmp_path / f"photos/{number}.png").write_bytes(buffer.getvalue())
    done = prepared(tmp_path / "photos", tmp_path / "out", EXACT, max_rejected_fraction=0.0)
    assert done["num_images"] == 1 and done["rejected"] == {"duplicate": 19}


@pytest.mark.slow
def test_a_dataset_of_other_settings_is_not_replaced_in_silence(repeated, tmp_path, monkeypatch):
    assert run(repeated, tmp_path / "out").returncode == 0
    before = contents(tmp_path / "out")
    for more, held in (
        (["--image_mode", "L"], "other settings (image_mode RGB, now L)"),
        (["--deduplicate", "exact"], "other settings (deduplicate none, now exact)"),
    ):
        done = run(repeated / "nowhere", tmp_path / "out", *more)  # found before the source is looked at
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert held in done.stderr and "--overwrite_output_dir" in done.stderr
    write_images(tmp_path / "others", 5)
    done = run(tmp_path / "others", tmp_path / "out")
    assert done.returncode == 1 and "other images (photos, now others)" in done.stderr
    assert contents(tmp_path / "out") == before
    write_images(repeated / "a", 1, start=700)  # the same source, grown
    assert "307 images" in run(repeated, tmp_path / "out").stdout
    assert "5 images" in run(tmp_path / "others", tmp_path / "out", "--overwrite_output_dir").stdout


def test_an_output_that_cannot_be_written_is_found_before_the_listing(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(tmp_path / "nowhere", tmp_path / "file/out")
    assert done.returncode == 1 and re.match("error: --output_dir .*file/out cannot be written", done.stderr)
