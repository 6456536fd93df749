"""Samples to score are in a temporary file, not in memory."""

from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator

from trainkit.errors import UserError
from trainkit.evaluation.spool import spooled


def test_samples_are_on_the_disk_and_leave_nothing_there(tmp_path, monkeypatch, on_the_cpu_alone):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    blocks = [np.full((2, 4, 4, 3), 7, np.uint8), np.full((1, 4, 4, 3), 9, np.uint8)]
    images = spooled(Accelerator(), iter(blocks), (3, 4, 4, 3))
    assert isinstance(images, np.memmap) and (images == np.concatenate(blocks)).all()
    assert not any(folder.iterdir())
    asked = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=asked.append(path) or 10))
    with pytest.raises(UserError, match=r"3 samples need 0.0 GB in .*temporary \(0.0 GB are free\); set TMPDIR to"):
        spooled(Accelerator(), iter(()), (3, 4, 4, 3))
    assert asked == [folder]
