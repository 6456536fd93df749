"""The class and caption of each image, shown by a real image or requested from a sample."""

# N images

from typing import NamedTuple

import numpy as np

from trainkit.data.sources.entries import ReadOptions
from trainkit.data.sources.folder import ImageFolder as FolderSource
from trainkit.data.sources.records import sorted_labels
from trainkit.data.sources.splits import ALL
from trainkit.evaluation.images import ImageFolder, ImageSet, PreparedFolder

NULL = "null"  # sample.py writes this for the null class
ROWS_PER_READ = 4096


class Annotations(NamedTuple):
    """Class and caption of each image (N,), None where there is none; `fingerprint` changes with the files."""

    labels: list[str | None]
    texts: list[str | None]
    fingerprint: str

    @property
    def label_names(self) -> list[str]:
        """The classes that occur, in the order of their numbers in training."""
        return sorted_labels({label for label in self.labels if label is not None})

    @property
    def has_labels(self) -> bool:
        return any(label is not None for label in self.labels)

    @property
    def has_texts(self) -> bool:
        return any(text is not None for text in self.texts)


def read_annotations(images: ImageSet, flag: str) -> Annotations:
    """The annotations of `images` from class folders, metadata files and NAME.txt, or from a prepared dataset.

    Only the first of several captions is used; .npz files have no annotations. Raises `UserError` naming `flag` or the
    file.
    """
    if isinstance(images, PreparedFolder):
        return _read_prepared(images)
    if not isinstance(images, ImageFolder):
        return Annotations([None] * len(images), [None] * len(images), images.fingerprint)
    source = FolderSource(images.folder, flag, ReadOptions(split=ALL))
    reader, names = source.reader, source.label_names or []
    known = {}
    for entry in source.entries:
        record = reader.read(entry)
        known[entry.path] = (names[record.label] if record.label >= 0 else None, _first_line(record.text))
    found = [known.get(file.relative_to(images.folder).as_posix(), (None, None)) for file in images.files]
    return Annotations([label for label, _ in found], [text for _, text in found], source.fingerprint)


def _read_prepared(images: PreparedFolder) -> Annotations:
    prepared = images.images
    names = prepared.label_names or []
    labels, texts = [], []
    for start in range(0, len(prepared), ROWS_PER_READ):
        part = np.arange(start, min(start + ROWS_PER_READ, len(prepared)))
        labels += [names[number] if number >= 0 else None for number in prepared.labels(part).tolist()]
        texts += [_first_line(text) for text in prepared.texts(part)]
    return Annotations(labels, texts, prepared.fingerprint)


def _first_line(text: str | None) -> str | None:
    return text.splitlines()[0] if text and text.strip() else None
