"""Preparing images: exact whatever happens to it, and no work done twice."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from process_helpers import ROOT, ScriptRun, run_code, run_forked
from source_files import contents, small_units

from trainkit.data.format import read_preparation
from trainkit.data.preparation import shards
from trainkit.data.preparation.prepare import PreparationSettings, prepare
from trainkit.data.sources.folder import FolderReader, ImageFolder

SETTINGS = PreparationSettings(16, 16, resize_mode="crop")


def write_images(folder: Path, count: int, side: int = 24, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(start)
    for number in range(start, start + count):
        pixels = generator.integers(0, 255, (side, side + number % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.{'jpg' if number % 2 else 'png'}")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """700 images of two classes, and three files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "a", 400)
    write_images(folder / "b", 300, start=400)
    (folder / "a/empty.jpg").write_bytes(b"")
    (folder / "b/text.png").write_text("not an image")
    cut = (folder / "a/00001.jpg").read_bytes()
    (folder / "b/cut.jpg").write_bytes(cut[: len(cut) // 2])
    return folder


@pytest.fixture
def units_of_32(monkeypatch):
    small_units(monkeypatch, 32)


def words(source: Path, output: Path, *more) -> list[str]:
    flags = ["--train_data_dir", source, "--output_dir", output, "--resolution", 16, "--center_crop", *more]
    return [*map(str, flags)]


def run(source: Path, output: Path, *more) -> subprocess.CompletedProcess:
    return run_forked("prepare_dataset.py", *words(source, output, *more), check=False)


@pytest.mark.slow
def test_the_folder_says_what_was_done(photos, tmp_path):
    done = run(photos, tmp_path / "out", "--num_proc", 2)
    assert done.returncode == 0, done.stderr
    assert "700 images, 3 rejected (1 empty, 1 not_an_image, 1 truncated; see rejected.jsonl)" in done.stdout
    assert "images/s" in done.stdout and done.stderr == ""
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    found = {line["source"]: line["fault"] for line in rejected}
    assert found == {"a/empty.jpg": "empty", "b/text.png": "not_an_image", "b/cut.jpg": "truncated"}
    preparation = read_preparation(tmp_path / "out")
    assert preparation["num_images"] == 700 and preparation["classes"] == {"a": 400, "b": 300}
    assert preparation["settings"] == dataclasses.asdict(SETTINGS) | {"background": [255, 255, 255]}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".lock",
        "contact_sheet.html",
        "dataset_info.json",
        "preparation.json",
        "rejected.jsonl",
        "state.json",
        *(shard["filename"] for shard in preparation["shards"]),
    }


@pytest.mark.slow
def test_stock_datasets_opens_it(photos, tmp_path):
    """In a process that has none of our code."""
    assert run(photos, tmp_path / "out").returncode == 0
    script = """
import sys, datasets
images = datasets.load_from_disk(sys.argv[1])
assert len(images) == 700 and images.features["label"].names == ["a", "b"], images
first = images.with_format("numpy")[0]
assert first["image"].shape == (768,) and first["source"] == "a/00000.png" and first["label"] == 0
assert images[450]["label"] == 1
assert images.select([5]).with_format("torch")[0]["image"].shape == (768,)
"""
    done = run_code(script, tmp_path / "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_bytes(photos, tmp_path, units_of_32):
    for number in (1, 2, 3):
        prepare(ImageFolder(photos), SETTINGS, tmp_path / str(number), num_proc=number, show_progress=False)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


@pytest.mark.slow
def test_killed_again_and_again_it_ends_the_same(tmp_path):
    write_images(tmp_path / "many", 1200, side=64)
    assert run(tmp_path / "many", tmp_path / "whole", "--num_proc", 2).returncode == 0
    killed_at = []
    for slices in (1, 3, 5):
        flags = words(tmp_path / "many", tmp_path / "killed", "--num_proc", 2)
        [process] = ScriptRun("prepare_dataset.py", *flags).ranks
        while process.poll() is None and finished_slices(tmp_path / "killed") < slices:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(finished_slices(tmp_path / "killed"))
        assert workers_end(process.pid), "workers of a killed run must not stay behind"
    assert killed_at == sorted(killed_at) and killed_at[-1] >= 5, killed_at
    done = run(tmp_path / "many", tmp_path / "killed", "--num_proc", 2)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def finished_slices(output: Path) -> int:
    return len(list((output / "work").glob("*.arrow")))


def workers_end(session: int, timeout_s: float = 20) -> bool:
    """Whether every process of the session (it has the number of its first process) is gone in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if session not in running_sessions():
            return True
        time.sleep(0.05)
    return False


def running_sessions() -> set[int]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, *fields = (process / "stat").read_text().rpartition(")")[2].split()
            if state != "Z":
                found.add(int(fields[2]))
    return found


def test_finished_slices_of_a_killed_run_are_not_decoded_again(photos, tmp_path, units_of_32, monkeypatch):
    source = ImageFolder(photos)
    with monkeypatch.context() as until_stopped, pytest.raises(Stopped):
        first = count_decoded(until_stopped, stop_after=200)
        prepare(source, SETTINGS, tmp_path / "out", num_proc=1, show_progress=False)
    decoded = count_decoded(monkeypatch)
    prepare(source, SETTINGS, tmp_path / "out", num_proc=1, show_progress=False)
    assert len(first) + len(decoded) <= len(source) + 8
    assert len(set(first) & set(decoded)) <= 8


class Stopped(Exception):
    pass


def count_decoded(monkeypatch, stop_after: int | None = None) -> list:
    """The paths that are decoded from now on in this process."""
    decoded, decode = [], shards.decode_image

    def counting(image, settings):
        if len(decoded) == stop_after:
            raise Stopped
        decoded.append(image)
        return decode(image, settings)

    monkeypatch.setattr(shards, "decode_image", counting)
    return decoded


def test_a_second_run_opens_no_image(photos, tmp_path, monkeypatch):
    first = prepare(ImageFolder(photos), SETTINGS, tmp_path / "out", show_progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    decoded = count_decoded(monkeypatch)
    assert prepare(ImageFolder(photos), SETTINGS, tmp_path / "out", num_proc=1, show_progress=False) == first
    assert not decoded
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_an_added_file_costs_its_own_unit_only(photos, tmp_path, units_of_32, monkeypatch):
    folder = tmp_path / "photos"
    write_images(folder, 500)
    prepare(ImageFolder(folder), SETTINGS, tmp_path / "out", num_proc=1, show_progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("data-*")}
    write_images(folder, 1, start=9000)
    decoded = count_decoded(monkeypatch)
    prepare(ImageFolder(folder), SETTINGS, tmp_path / "out", num_proc=1, show_progress=False)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("data-*")}
    assert len(before) > 8 and len(before.items() - after.items()) == 1 == len(after.items() - before.items())
    assert len(decoded) <= 4 * 32
    fresh = prepare(ImageFolder(folder), SETTINGS, tmp_path / "fresh", num_proc=1, show_progress=False)
    assert contents(tmp_path / "fresh") == contents(tmp_path / "out") and fresh["num_images"] == 501


def test_a_moved_folder_needs_no_new_work(tmp_path, monkeypatch):
    write_images(tmp_path / "here/photos", 20)
    prepare(ImageFolder(tmp_path / "here/photos"), SETTINGS, tmp_path / "out", show_progress=False)
    (tmp_path / "here").rename(tmp_path / "there")
    decoded = count_decoded(monkeypatch)
    prepare(ImageFolder(tmp_path / "there/photos"), SETTINGS, tmp_path / "out", show_progress=False)
    assert not decoded


@pytest.mark.slow
def test_other_settings_replace_the_dataset(photos, tmp_path):
    output = tmp_path / "out"
    first = prepare(ImageFolder(photos), SETTINGS, output, show_progress=False)
    second = prepare(ImageFolder(photos), PreparationSettings(8, 8), output, show_progress=False, overwrite=True)
    assert not {shard["filename"] for shard in first["shards"]} & {path.name for path in output.iterdir()}
    assert second["settings"]["height"] == 8 and second["fingerprint"] != first["fingerprint"]


class DeadlyReader(FolderReader):
    """Reading a file that is named so kills the process, as a fault in a C decoder would."""

    def read(self, entry):
        if "crashing" in entry.path and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(entry)


@pytest.mark.slow
def test_a_file_that_kills_the_worker_is_rejected_and_nothing_else_is_lost(tmp_path, units_of_32, monkeypatch):
    write_images(tmp_path / "photos", 60)
    for name in ("00013-crashing.png", "00047-crashing.png"):
        Image.new("L", (9, 9)).save(tmp_path / "photos" / name)
    monkeypatch.setattr(ImageFolder, "reader", property(lambda self: DeadlyReader(str(self.folder), {})))
    done = prepare(ImageFolder(tmp_path / "photos"), SETTINGS, tmp_path / "out", num_proc=2, show_progress=False)
    assert done["num_images"] == 60 and done["rejected"] == {"crashed": 2}


@pytest.mark.slow
def test_a_program_read_from_a_pipe_may_prepare(photos, tmp_path):
    """Workers must not ask for the main script: it may be no file, have no guard, or be slow to import."""
    script = f"""
from trainkit.data.preparation.prepare import PreparationSettings, prepare
from trainkit.data.sources.folder import ImageFolder
prepare(ImageFolder({str(photos)!r}), PreparationSettings(16, 16), {str(tmp_path / "out")!r}, num_proc=2)
"""
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and "700 images" in done.stdout, done.stderr


@pytest.mark.slow
def test_two_runs_at_one_folder_do_the_work_once(photos, tmp_path):
    runs = [ScriptRun("prepare_dataset.py", *words(photos, tmp_path / "out", "--num_proc", 2)) for _ in range(2)]
    done = [run.wait(timeout=120) for run in runs]
    said = [process.stdout for process in done]
    assert [process.returncode for process in done] == [0, 0]
    assert (
        sum("is up to date" in text for text in said) == 1 and sum("prepared 703 files" in text for text in said) == 1
    )


@pytest.mark.slow
def test_nothing_readable_is_a_user_error(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / f"photos/{number}.jpg").write_text("no")
    done = run(tmp_path / "photos", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: no readable image in photos: 3 files rejected, the first 0.jpg: not_an_image"
    )
    assert done.stderr.count("\n") == 1
    assert len((tmp_path / "out/rejected.jsonl").read_text().splitlines()) == 3
    assert read_preparation(tmp_path / "out") is None


@pytest.mark.slow
def test_user_mistakes_are_one_line(photos, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    cases = [
        (["--output_dir", tmp_path / "full"], r"full holds other files \(thesis.txt\); give a new or empty folder"),
        (["--output_dir", tmp_path / "file"], "--output_dir .*file cannot be written"),
        (["--resolution", "12x"], "--resolution 12x is not a size"),
        (["--resolution", "0"], "--resolution 0 is not a size"),
        (["--num_proc", "-2"], "--num_proc -2 must be at least 0"),
        (["--background", "puce-ish"], "--background puce-ish is not a colour"),
        (["--train_data_dir", tmp_path / "nowhere"], "--train_data_dir .*nowhere does not exist"),
    ]
    for arguments, message in cases:
        done = run(photos, tmp_path / "out", *arguments)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert re.search(message, done.stderr), done.stderr
    assert (tmp_path / "full/thesis.txt").read_text() == "mine"
    done = run_forked("prepare_dataset.py", check=False)
    assert done.stderr == "error: --output_dir is missing; give a folder for the prepared dataset\n"


SMALL_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))  # slices fit, shards do not
import prepare_dataset
from trainkit.errors import run_script
run_script(prepare_dataset.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_full_disk_is_a_user_error_and_what_is_finished_stays(photos, tmp_path, num_proc):
    done = run_code(SMALL_FILES, *words(photos, tmp_path / "out", "--num_proc", num_proc))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot be written" in done.stderr and "the same command continues it" in done.stderr
    assert finished_slices(tmp_path / "out") > 3
    assert run(photos, tmp_path / "out").returncode == 0
    assert read_preparation(tmp_path / "out")["num_images"] == 700


def test_a_flood_of_broken_files_prints_nothing(tmp_path, units_of_32, capfd):
    write_images(tmp_path / "photos", 20)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "TIFF", compression="tiff_lzw")
    for number in range(20):
        content = bytearray(buffer.getvalue())
        content[20 + number : 40 + number] = b"\xff" * 20
        (tmp_path / f"photos/broken{number}.tif").write_bytes(content)
    for num_proc in (1, 2):
        output = tmp_path / f"out{num_proc}"
        done = prepare(ImageFolder(tmp_path / "photos"), SETTINGS, output, num_proc, show_progress=False)
        assert done["num_images"] + sum(done["rejected"].values()) == 40
    assert capfd.readouterr() == ("", "")


def test_file_names_need_not_be_utf_8(tmp_path):
    write_images(tmp_path / "photos", 3)
    os.rename(os.fsencode(tmp_path / "photos/00000.png"), os.fsencode(tmp_path / "photos") + b"/\xff\xe4.png")
    with contextlib.suppress(OSError):  # some file systems refuse the name
        (tmp_path / "photos/\udcff.jpg").write_text("no image")
    done = prepare(ImageFolder(tmp_path / "photos"), SETTINGS, tmp_path / "out", show_progress=False)
    assert done["num_images"] == 3
