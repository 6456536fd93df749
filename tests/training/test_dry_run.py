"""--dry_run: everything is checked and measured, nothing is trained, and nothing is left behind."""

import glob
import re
import shutil
import tempfile
from collections import namedtuple
from types import SimpleNamespace

import pytest
from process_helpers import run_forked
from source_files import SETTINGS, write_photos
from training_helpers import run_in_process, tiny_run

from trainkit.data.cache import _few_to_encode
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation.prepare import prepare
from trainkit.data.sources.folder import ImageFolder
from trainkit.data.trial import TRIAL_FILES
from trainkit.errors import UserError


@pytest.fixture
def dry_run(image_folder, tiny_unet, tmp_path, monkeypatch, capsys):
    """Start a script in this process with --dry_run; returns what it printed."""

    def call(script="train_unconditional", name="out", **flags):
        flags, cache = {"dry_run": True} | flags, tmp_path / "cache"
        run_in_process(monkeypatch, script, tiny_run(image_folder, tiny_unet, cache, tmp_path / name, **flags))
        return capsys.readouterr().out

    return call


def leftovers():
    return glob.glob(f"{tempfile.gettempdir()}/trainkit-dry-run-*/*/*.safetensors")


def test_a_raw_folder_is_planned_without_preparing_it(dry_run, tmp_path):
    before = leftovers()
    printed = dry_run(max_train_steps=1000)
    assert "37 images 16x16 RGB, not prepared yet" in printed
    assert "preparing   37 files, once: about " in printed
    assert "1,000 steps = 8,000 images = 216 epochs of 37 images" in printed
    assert "for 1,000 steps at " in printed and "memory " in printed and "disk        334 checkpoints of " in printed
    assert printed.splitlines()[-1].startswith("--dry_run: all checks passed, nothing was trained")
    assert list(tmp_path.iterdir()) == [] and leftovers() == before  # neither the output folder nor the cache


@pytest.mark.slow
def test_it_leaves_a_run_that_it_would_resume_as_it_is(dry_run, tmp_path):
    dry_run(dry_run=None, max_train_steps=4)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    printed = dry_run(max_train_steps=30, resume_from_checkpoint="latest")
    assert "checkpoint-4: 4 of 30 steps done" in printed and "for 26 steps at " in printed
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match="holds checkpoint-4 of an earlier run"):
        dry_run()


@pytest.mark.slow
def test_a_disk_without_room_for_the_checkpoints_is_an_error(dry_run, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**7))
    with pytest.raises(UserError, match=r"334 checkpoints take .* MB, 10.0 MB are free: use --checkpoints_total"):
        dry_run(max_train_steps=1000)
    assert "1 checkpoint " not in dry_run(max_train_steps=1000, checkpoints_total_limit=2)


def test_a_run_of_one_step_is_timed_by_it(dry_run):
    found = re.search(r"for 1 step at (\S+) s ", dry_run(max_train_steps=1))
    assert found and float(found[1]) > 0.002  # forward and backward pass, and not only the end of the step


def test_a_step_that_does_not_fit_is_one_line(dry_run, monkeypatch):
    def refuse(*arguments, **keywords):
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr("trainkit.training.run.Run.update", refuse)
    with pytest.raises(UserError, match="--train_batch_size 8: a micro-step does not fit into the memory"):
        dry_run()


@pytest.mark.slow
def test_a_hub_that_refuses_ends_it(dry_run, monkeypatch):
    def refuse(options):
        raise UserError(f"--push_to_hub: no access to {options.hub_model_id}")

    monkeypatch.setattr("trainkit.training.dry_run.check_hub_access", refuse)
    with pytest.raises(UserError, match="no access to me/model"):
        dry_run(push_to_hub=True, hub_model_id="me/model")
    dry_run(hub_model_id="me/model")  # without a push nothing is asked


def test_classes_and_held_out_images(dry_run, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "held")
    printed = dry_run("train_conditional", validation_data_dir=tmp_path / "held")
    assert "2 classes" in printed and "held-out loss at the end" in printed
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_two_processes(image_folder, tiny_unet, tmp_path):
    arguments = tiny_run(image_folder, tiny_unet, tmp_path / "cache", tmp_path / "out", dry_run=True)
    done = run_forked("train_unconditional.py", *arguments, processes=2)
    assert "16 images per step = 8 per device x 2 processes" in done.stdout
    assert done.stdout.count("--dry_run: all checks passed") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, count", [
    ({"condition": ["text"]}, TRIAL_FILES), ({"condition": ["text", "image"]}, TRIAL_FILES),
    ({"vae_name_or_path": "vae"}, TRIAL_FILES), ({"condition": ["class"]}, 70), ({}, 70),
])  # fmt: skip
def test_what_is_encoded_is_only_tried(tmp_path, flags, count):
    write_photos(tmp_path / "photos", 70)
    prepare(ImageFolder(tmp_path / "photos"), SETTINGS, tmp_path / "prepared", num_proc=1, show_progress=False)
    images = PreparedImages(tmp_path / "prepared", None)
    assert len(_few_to_encode(images, SimpleNamespace(dry_run=True, **flags))) == count
    assert _few_to_encode(images, SimpleNamespace(dry_run=False, **flags)) is images
