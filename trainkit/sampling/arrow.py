"""Samples as a prepared dataset, which the training scripts, evaluate_samples.py and `datasets` open.

Classes, prompts or vectors are its columns. It is written by the code of prepare_dataset.py, with the staged images
as its source.
"""

# N images, H/W pixels, C channels

import bisect
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainkit.data.account import Account
from trainkit.data.format import LOCK_NAME, NO_LABEL, read_preparation
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.pairing import PairSettings
from trainkit.data.preparation.prepare import prepare
from trainkit.data.sources.records import UNIT_ITEMS, Record, Unit
from trainkit.errors import UserError
from trainkit.sampling.conditions import Conditions
from trainkit.sampling.files import Staging, image_settings

FLAG = "--output_dir"


class ArrowSamples:
    """The prepared dataset in a folder of samples. `identity` names the settings that its images depend on."""

    pieces_at_once = True

    def __init__(self, folder: Path, image_shape: tuple[int, int, int], conditions: Conditions | None, identity: str):
        self.folder, self._staging, self._identity = folder, Staging(folder), identity
        self._settings, self._conditions = image_settings(image_shape), conditions
        if conditions is not None and "vectors" in conditions.lists:
            if any(np.isnan(vector).any() for vector in conditions.lists["vectors"]):
                raise UserError(
                    "--output_format arrow cannot hold a null vector (a row of nan in --vectors_file): use another "
                    "format"
                )

    def held(self) -> set[int]:
        return set(range(self._count())) | self._staging.numbers()

    def write(self, numbers: Sequence[int], images: np.ndarray) -> None:
        self._staging.write(numbers, images)

    def first(self, count: int) -> np.ndarray:
        return PreparedImages(self.folder).gather(np.arange(count))

    def clear_temporary(self) -> None:
        self._staging.clear_temporary()

    def put_together(self, num_images: int) -> None:
        if self._count() < num_images:
            (self.folder / LOCK_NAME).touch()  # marks the folder as one that `prepare` may write to
            source = StagedSource(self, num_images, self._count())
            prepare(source, self._settings, self.folder, 1, False, FLAG, max_rejected_fraction=0)
        self._staging.delete()

    def _count(self) -> int:
        """The images of the dataset; 0 if there is none."""
        return (read_preparation(self.folder) or {}).get("num_images", 0)


class StagedSource:
    """Images 0 to `num_images` - 1 of `samples` as a source of `prepare`; the first `num_held` are in the dataset."""

    def __init__(self, samples: ArrowSamples, num_images: int, num_held: int):
        self._samples, self._num_images, self._num_held = samples, num_images, num_held
        conditions = samples._conditions
        self.name, self.fingerprint = f"samples {samples._identity}", f"{samples._identity} {num_images}"
        self.label_names = None if conditions is None else conditions.label_names()
        self.has_text = conditions is not None and conditions.text(0) is not None
        vector = None if conditions is None else conditions.vector(0)
        self.vector_length = None if vector is None else len(vector)
        self.account = Account()
        self.pairs: PairSettings | None = None

    def __len__(self) -> int:
        return self._num_images

    @property
    def reader(self) -> "StagedReader":
        return StagedReader(self._samples, self._num_images, self._num_held)

    def units(self) -> list[Unit]:
        starts = range(0, self._num_images, UNIT_ITEMS)
        parts = (range(start, min(start + UNIT_ITEMS, self._num_images)) for start in starts)
        return [Unit(f"{self._samples._identity} {part.start} {part.stop}", part) for part in parts]


class StagedReader:
    """Reads an image by its number, from the staging folder or the dataset that is about to grow."""

    def __init__(self, samples: ArrowSamples, num_images: int, num_held: int):
        self._conditions, self._num_held = samples._conditions, num_held
        self._labels = None if self._conditions is None else self._conditions.label_ids(num_images)
        self._dataset = PreparedImages(samples.folder) if num_held else None
        self._pieces = samples._staging.pieces()
        self._starts = [piece.first for piece in self._pieces]
        self._open: tuple[int, np.ndarray] | None = None  # the piece that was read last

    def name(self, item: int) -> str:
        return f"{item:06d}"

    def read(self, item: int) -> Record:
        image = self._image(item)
        if self._conditions is None:
            return Record(image, NO_LABEL, None)
        label = NO_LABEL if self._labels is None else int(self._labels[item])
        return Record(image, label, self._conditions.text(item), self._conditions.vector(item))

    def _image(self, item: int) -> np.ndarray:
        if self._dataset is not None and item < self._num_held:
            return self._dataset.gather(np.array([item]))[0]
        place = bisect.bisect_right(self._starts, item) - 1
        if self._open is None or self._open[0] != place:
            self._open = place, np.load(self._pieces[place].path)
        return self._open[1][item - self._starts[place]]
