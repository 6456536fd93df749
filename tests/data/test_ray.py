"""Preparing on a Ray cluster: the same result as on processes, whatever happens to a worker."""

import os
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainkit.data.images.decode import PreparationSettings
from trainkit.data.preparation import prepare as prepare_module
from trainkit.data.preparation.prepare import prepare
from trainkit.data.preparation.ray_engine import ray_engine
from trainkit.data.sources import records
from trainkit.data.sources.folder import FolderReader, ImageFolder
from trainkit.errors import UserError

SETTINGS = PreparationSettings(16, 16, resize_mode="crop")


class MortalReader(FolderReader):
    """Writes down each read; one file kills its worker the first time, another every time."""

    def read(self, entry):
        journal = Path(self.folder).parent / "journal"
        with open(journal, "a") as file:
            file.write(f"{entry.path} {os.getpid()}\n")
        if "once" in entry.path and journal.read_text().count(entry.path) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if "crashing" in entry.path:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(entry)


@pytest.mark.slow(8)
def test_a_killed_worker_costs_its_slice_and_the_result_is_that_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "UNIT_ITEMS", 32)
    monkeypatch.setattr(prepare_module, "SLICE_ITEMS", 4)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(120):
        name = {30: "030-once.png", 90: "090-crashing.png"}.get(number, f"{number:03d}.png")
        Image.fromarray(np.full((20, 20, 3), number, np.uint8)).save(photos / name)
    monkeypatch.setattr(ImageFolder, "reader", property(lambda self: MortalReader(str(self.folder), {})))
    with_ray = {"num_proc": 2, "engine": ray_engine(None), "show_progress": False}
    done = prepare(ImageFolder(photos), SETTINGS, tmp_path / "ray", **with_ray)
    assert done["num_images"] == 119 and done["rejected"] == {"crashed": 1}
    reads = [line.split() for line in (tmp_path / "journal").read_text().splitlines()]
    again = {path for path, count in Counter(path for path, _ in reads).items() if count > 1}
    assert {"030-once.png", "090-crashing.png"} <= again and len(again) <= 2 * 4, "other slices were made once"
    assert len({pid for _, pid in reads}) >= 4, "two workers, and those that took the place of the killed"

    prepare(ImageFolder(photos), SETTINGS, tmp_path / "processes", num_proc=2, show_progress=False)
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("ray", "processes")
    )
    assert ours == theirs


def test_ray_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="--engine ray needs the package ray: pip install ray"):
        ray_engine(None)
