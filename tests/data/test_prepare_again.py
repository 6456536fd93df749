"""Preparing into a folder that holds a dataset, or from one: what is said about it."""

import dataclasses
import sys
from pathlib import Path

import pytest
from source_files import SETTINGS, write_photos

import prepare_dataset
from trainkit.data.preparation.prepare import prepare
from trainkit.data.sources.folder import ImageFolder
from trainkit.data.sources.opening import open_source
from trainkit.errors import UserError
from trainkit.options.data import SourceOptions


@pytest.fixture
def two_classes(tmp_path) -> Path:
    write_photos(tmp_path / "photos", 12)
    return tmp_path / "photos"


def test_preparing_again_says_why(two_classes, tmp_path, capsys):
    def again(settings=SETTINGS, overwrite=False, **options):
        capsys.readouterr()
        source = open_source(SourceOptions(train_data_dir=str(two_classes), num_proc=1, **options))
        prepare(source, settings, tmp_path / "out", num_proc=1, overwrite=overwrite)
        return next((line for line in capsys.readouterr().out.splitlines() if "prepared again" in line), "")

    assert again() == ""  # a new one
    assert again() == ""  # up to date
    assert "its classes differ (2: a, b, now none), so every image is read" in again(label_from="none")
    assert "(none, now 2: a, b)" in again()
    other = dataclasses.replace(SETTINGS, height=32, width=32)
    assert "its settings differ (height 16, now 32; width 16, now 32)" in again(other, overwrite=True)
    shard = next((tmp_path / "out").glob("data-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:100])
    assert "files of it are missing or cut short" in again(other)
    write_photos(two_classes, 1, start=5000)
    assert "added, changed or removed; the rest is kept" in again(other)


def test_a_prepared_dataset_is_refused_with_the_settings_that_differ(two_classes, tmp_path, monkeypatch):
    prepare(ImageFolder(two_classes), SETTINGS, tmp_path / "held", num_proc=1, show_progress=False)
    arguments = ["--train_data_dir", tmp_path / "held", "--output_dir", tmp_path / "new", "--center_crop"]
    monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", *map(str, arguments), "--resolution", "24"])
    with pytest.raises(UserError, match=r"prepared dataset already: .*\(height 16, now 24; width 16, now 24\)"):
        prepare_dataset.main()
    assert not (tmp_path / "new").exists()
