"""SIGKILL at random moments, files that change, folders that move: never other bytes, never the same work twice."""

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from process_helpers import ScriptRun, run_forked
from source_files import contents, small_units

from trainkit.data.format import read_preparation
from trainkit.data.images.decode import PreparationSettings
from trainkit.data.preparation import finalize as finalize_module
from trainkit.data.preparation import shards
from trainkit.data.preparation.prepare import prepare
from trainkit.data.sources.folder import ImageFolder
from trainkit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = PreparationSettings(16, 16, resize_mode="crop")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(600):
        pixels = generator.integers(0, 255, (18, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.bmp")
    return folder


@pytest.fixture
def units_of_64(monkeypatch):
    small_units(monkeypatch, 64)


def progress(output: Path) -> int:
    """About how many slices are done: 8 to a shard."""
    return 8 * len(list(output.glob("data-*.arrow"))) + len(list(output.glob("work/*.arrow")))


def workers(parent: int) -> list[int]:
    """Processes that a run started, directly or through its fork server."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == parent and int(process.name) != parent:  # of its session
                found.append(int(process.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [1, 2])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(photos, tmp_path, units_of_64, num_proc):
    prepare(ImageFolder(photos), SETTINGS, tmp_path / "whole", num_proc=1, show_progress=False)
    generator = random.Random(num_proc)
    words = "tests/slow_prepare.py", photos, tmp_path / "out", num_proc
    environment, killed = {"PYTHONPATH": str(ROOT)}, 0
    for attempt in range(6):
        wanted = progress(tmp_path / "out") + generator.randrange(1, 12)
        [process] = ScriptRun(*words, environment=environment).ranks  # the leader of a session of its own
        while process.poll() is None and progress(tmp_path / "out") < wanted:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.01))
        victims = workers(process.pid)
        if attempt % 3 == 0 or not victims:
            process.send_signal(signal.SIGKILL)
        elif attempt % 3 == 1:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(generator.choice(victims), signal.SIGKILL)
            time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
        killed += process.wait() != 0
    assert killed >= 5, "it must have been interrupted while it worked"
    run_forked(*words, environment=environment)
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_a_slice_that_lost_power_cut_short_is_made_again(photos, tmp_path, units_of_64, monkeypatch):
    prepare(ImageFolder(photos), SETTINGS, tmp_path / "whole", num_proc=1, show_progress=False)
    with monkeypatch.context() as stopped, pytest.raises(InterruptedError):
        stopped.setattr(shards.ShardWriter, "join", interrupted)
        prepare(ImageFolder(photos), SETTINGS, tmp_path / "out", num_proc=1, show_progress=False, overwrite=True)
    slices = sorted((tmp_path / "out/work").iterdir())
    slices[0].write_bytes(b"")
    slices[1].write_bytes(slices[1].read_bytes()[:-3000])
    prepare(ImageFolder(photos), SETTINGS, tmp_path / "out", num_proc=1, show_progress=False, overwrite=True)
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def interrupted(writer, job):
    raise InterruptedError


def opened_images(monkeypatch) -> list[str]:
    """Names of the images that are opened from now on in this process."""
    opened, decode = [], shards.decode_image
    monkeypatch.setattr(shards, "decode_image", lambda *given: (opened.append(given[0].name), decode(*given))[1])
    return opened


@pytest.mark.slow
def test_changed_deleted_and_added_files_cost_their_units_alone(photos, tmp_path, units_of_64, monkeypatch):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    prepare(ImageFolder(folder), SETTINGS, tmp_path / "out", num_proc=1, show_progress=False)
    paths = sorted(folder.iterdir())
    for change in (
        lambda: shutil.copy(paths[3], paths[17]) and os.utime(paths[17], ns=(1, 1)),
        lambda: paths[400].unlink(),
        lambda: shutil.copy(paths[3], folder / "0300b.bmp"),
    ):
        units = {unit.identity: [entry.path for entry in unit.items] for unit in ImageFolder(folder).units()}
        change()
        of_new_units = {
            entry.path for unit in ImageFolder(folder).units() if unit.identity not in units for entry in unit.items
        }
        with monkeypatch.context() as counting:
            opened = opened_images(counting)
            prepare(ImageFolder(folder), SETTINGS, tmp_path / "out", num_proc=1, show_progress=False)
        assert sorted(opened) == sorted(of_new_units) and 0 < len(opened) < 300
    prepare(ImageFolder(folder), SETTINGS, tmp_path / "fresh", num_proc=1, show_progress=False)
    assert contents(tmp_path / "fresh") == contents(tmp_path / "out")


def test_moving_source_and_output_costs_nothing(photos, tmp_path, monkeypatch):
    shutil.copytree(photos, tmp_path / "here")
    prepare(ImageFolder(tmp_path / "here"), SETTINGS, tmp_path / "out", num_proc=1, show_progress=False)
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "out").rename(tmp_path / "moved")
    opened = opened_images(monkeypatch)
    prepare(ImageFolder(tmp_path / "there"), SETTINGS, tmp_path / "moved", num_proc=1, show_progress=False)
    assert not opened


def test_other_images_replace_nothing_unasked(photos, tmp_path):
    prepare(ImageFolder(photos), SETTINGS, tmp_path / "out", num_proc=1, show_progress=False)
    (tmp_path / "others").mkdir()
    shutil.copy(next(path for path in photos.rglob("*.*") if path.is_file()), tmp_path / "others" / "other.png")
    with pytest.raises(UserError, match="holds a dataset of other images .* or --overwrite_output_dir to replace it"):
        prepare(ImageFolder(tmp_path / "others"), SETTINGS, tmp_path / "out", num_proc=1, show_progress=False)
    others = ImageFolder(tmp_path / "others")
    done = prepare(others, SETTINGS, tmp_path / "out", num_proc=1, show_progress=False, overwrite=True)
    assert done["num_images"] == 1


@pytest.mark.slow
def test_a_run_killed_while_it_swept_is_swept_after(photos, tmp_path, units_of_64, monkeypatch):
    output = tmp_path / "out"
    prepare(
        ImageFolder(photos),
        PreparationSettings(8, 8, resize_mode="crop"),
        output,
        num_proc=1,
        show_progress=False,
        overwrite=True,
    )
    with monkeypatch.context() as stopped, pytest.raises(InterruptedError):
        stopped.setattr(finalize_module, "_delete_leftovers", lambda *given: interrupted(None, None))
        prepare(ImageFolder(photos), SETTINGS, output, num_proc=1, show_progress=False, overwrite=True)
    assert len(list(output.glob("data-*"))) > len(read_preparation(output)["shards"]) and (output / "work").exists()
    prepare(ImageFolder(photos), SETTINGS, output, num_proc=1, show_progress=False, overwrite=True)
    assert len(list(output.glob("data-*"))) == len(read_preparation(output)["shards"])
    assert not (output / "work").exists()


@pytest.mark.slow
def test_two_runs_with_other_settings_at_one_folder_take_turns(photos, tmp_path):
    words = ["prepare_dataset.py", "--train_data_dir", photos, "--center_crop", "--no_contact_sheet"]
    words += ["--overwrite_output_dir", "--output_dir", tmp_path / "out", "--num_proc", 1, "--resolution"]
    both = [ScriptRun(*words, side) for side in (8, 16)]
    assert [run.wait(timeout=60).returncode for run in both] == [0, 0]
    last = read_preparation(tmp_path / "out")
    settings = PreparationSettings(last["settings"]["height"], last["settings"]["width"], resize_mode="crop")
    prepare(ImageFolder(photos), settings, tmp_path / "alone", num_proc=1, show_progress=False)
    assert contents(tmp_path / "alone") == contents(tmp_path / "out")
