"""A few images of a source, for `--dry_run`: everything is listed, and only these are read and decoded."""

import atexit
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.data.account import Account
from trainkit.data.files import RemotePath
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.pairing import PairSettings
from trainkit.data.preparation.prepare import prepare
from trainkit.data.settings import PreparationSettings
from trainkit.data.sources.records import Unit
from trainkit.data.sources.source import Reader, Source

TRIAL_FILES, TRIAL_UNITS = 64, 8  # read, from this many parts of the listing


class TrialImages(PreparedImages):
    """The first `count` images of a prepared dataset, in the place of `num_files` in all.

    `seconds` is the time on one core to read and decode them; 0 if they were prepared before.
    """

    def __init__(
        self,
        folder: Path | RemotePath,
        resolution: tuple[int, int] | None,
        count: int,
        num_files: int,
        seconds: float = 0.0,
    ):
        super().__init__(folder, resolution)
        self.count, self.num_files, self.seconds = count, num_files, seconds
        self.fingerprint += f"-first-{count}"  # its encodings are others than those of all images

    def __len__(self) -> int:
        return min(self.count, super().__len__())

    def __reduce__(self):
        size = self.height, self.width
        return TrialImages, (self.folder, size, self.count, self.num_files, self.seconds)


def num_images(images: Any) -> int:
    """The number of images that training would use: of a trial, that of all files."""
    source = getattr(images, "images", images)  # of latents
    return source.num_files if isinstance(source, TrialImages) else len(images)


def trial_of(images: Any) -> TrialImages | None:
    """The trial that `images` (pixels or latents) are, if any."""
    source = getattr(images, "images", images)
    return source if isinstance(source, TrialImages) else None


@dataclass
class _Sample:
    """A source of some files of another one."""

    name: str
    fingerprint: str
    label_names: list[str] | None
    has_text: bool
    vector_length: int | None
    pairs: PairSettings | None
    account: Account
    reader: Reader
    cut: list[Unit]

    def __len__(self) -> int:
        return sum(len(unit.items) for unit in self.cut)

    def units(self) -> list[Unit]:
        return self.cut


def try_source(source: Source, settings: PreparationSettings, resolution: tuple[int, int] | None) -> TrialImages:
    """Prepare `TRIAL_FILES` files of `source` in a temporary folder, which is deleted when the process ends.

    Each process of a run has a folder of its own, of the same images. Raises `UserError`.
    """
    sample = _Sample(
        source.name,
        f"{source.fingerprint}-trial",
        source.label_names,
        source.has_text,
        source.vector_length,
        source.pairs,
        source.account,
        source.reader,
        _cut(source.units()),
    )
    parent = tempfile.mkdtemp(prefix="trainkit-dry-run-")
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    folder = Path(parent) / "trial"  # its name is a part of that of its encodings
    started = time.perf_counter()
    prepare(sample, settings, folder, num_proc=1, show_progress=False)
    return TrialImages(folder, resolution, TRIAL_FILES, len(source), time.perf_counter() - started)


def _cut(units: list[Unit]) -> list[Unit]:
    """At most `TRIAL_FILES` items, evenly from at most `TRIAL_UNITS` of `units`."""
    chosen = _evenly(units, TRIAL_UNITS)
    each = -(-TRIAL_FILES // max(1, len(chosen)))
    return [Unit(f"{unit.identity}-trial-{each}", _evenly(unit.items, each)) for unit in chosen]


def _evenly(items: Sequence, count: int) -> list:
    """At most `count` of `items`, from the first on, at equal distances."""
    step = max(1, -(-len(items) // count))
    return [items[place] for place in range(0, len(items), step)]
