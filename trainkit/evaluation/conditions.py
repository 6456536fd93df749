"""What each image of a set shows, or each sample was asked to show: its class and its caption."""

# N images

from typing import NamedTuple

import numpy as np

from trainkit.data.sources.folder import ImageFolder as FolderSource
from trainkit.data.sources.records import sorted_labels
from trainkit.evaluation.images import ImageFolder, PreparedFolder

NULL = "null"  # what sample.py writes for no class in particular
PART = 4096


class Shown(NamedTuple):
    """Class and caption of each image (N,), None where nobody told; `fingerprint` is that of the files."""

    labels: list[str | None]
    texts: list[str | None]
    fingerprint: str

    @property
    def label_names(self) -> list[str]:
        """The classes there are images of, in the order that training numbers them in."""
        return sorted_labels({label for label in self.labels if label is not None})

    @property
    def has_labels(self) -> bool:
        return any(label is not None for label in self.labels)

    @property
    def has_texts(self) -> bool:
        return any(text is not None for text in self.texts)


def read_shown(images: ImageFolder | PreparedFolder, flag: str) -> Shown:
    """What `images` show: by class folders, metadata files and NAME.txt, or by the columns of a prepared dataset.

    Of several captions it is the first. Raises `UserError` naming `flag` or the file.
    """
    if isinstance(images, PreparedFolder):
        return _read_prepared(images)
    source = FolderSource(images.folder, flag)
    reader, names = source.reader, source.label_names or []
    known = {}
    for entry in source.entries:
        record = reader.read(entry)
        known[entry.path] = (names[record.label] if record.label >= 0 else None, _first_line(record.text))
    found = [known.get(file.relative_to(images.folder).as_posix(), (None, None)) for file in images.files]
    return Shown([label for label, _ in found], [text for _, text in found], source.fingerprint)


def _read_prepared(images: PreparedFolder) -> Shown:
    prepared = images.images
    names = prepared.label_names or []
    labels, texts = [], []
    for start in range(0, len(prepared), PART):
        part = np.arange(start, min(start + PART, len(prepared)))
        labels += [names[number] if number >= 0 else None for number in prepared.labels(part).tolist()]
        texts += [_first_line(text) for text in prepared.texts(part)]
    return Shown(labels, texts, prepared.fingerprint)


def _first_line(text: str | None) -> str | None:
    return text.splitlines()[0] if text and text.strip() else None
