"""A folder of image files as a source: class folders, metadata files and sidecar captions are understood."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainkit.data import faults
from trainkit.data.account import Kind
from trainkit.data.faults import RejectedImage
from trainkit.data.format import NO_LABEL
from trainkit.data.sources import records
from trainkit.data.sources.entries import NOT_A_FILE, Entry, ReadOptions, sidecar_path
from trainkit.data.sources.listing import list_folder
from trainkit.data.sources.records import Record, Unit, cuts, first_length, path_bytes, sorted_labels
from trainkit.data.sources.texts import read_caption
from trainkit.data.sources.vectors import MAX_VECTOR_BYTES, parse_npy


class ImageFolder:
    """Image files under a folder, recursively; class folders, metadata files and NAME.txt captions are understood."""

    def __init__(self, folder: str | Path, flag: str = "--train_data_dir", options: ReadOptions | None = None):
        self.folder, options = Path(folder), options or ReadOptions()
        self.name = self.folder.resolve().name or "images"
        listing = list_folder(self.folder, flag, options)
        self.entries, labels, self.has_text, has_vector, vector_files, has_pairs, self.account = listing
        self.pairs = options.pairs if has_pairs else None
        self._condition_folder = Path(options.conditioning_dir or folder)
        self.label_names = sorted_labels(labels, self.account) if labels else None
        vectors = (_entry_vector(self.folder, entry) for entry in self.entries) if has_vector else ()
        self.vector_length = first_length(vectors)
        if self.vector_length == 0 and vector_files:  # masks, depth maps or latents
            self.vector_length = None
            self.account.add(Kind.VECTOR_NOT_USED, count=vector_files)
            self.account.move(Kind.VECTOR_FILES, Kind.SIDECAR_NOT_USED, vector_files)
        self.fingerprint = _identity(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def reader(self) -> "FolderReader":
        label_ids = {name: number for number, name in enumerate(self.label_names or ())}
        folder, has_vectors = str(self.folder.resolve()), self.vector_length is not None
        return FolderReader(folder, label_ids, has_vectors, self.has_text, str(self._condition_folder.resolve()))

    def units(self) -> list[Unit]:
        parts = [self.entries.part(*bounds) for bounds in cuts(self.entries.paths(), records.UNIT_ITEMS)]
        return [Unit(_identity(part), part) for part in parts]


class FolderReader(NamedTuple):
    folder: str
    label_ids: dict[str, int]
    reads_vectors: bool = True
    has_text: bool = False
    condition_folder: str = ""

    def name(self, entry: Entry) -> str:
        return entry.path

    def read(self, entry: Entry) -> Record:
        if entry.size == NOT_A_FILE:
            raise RejectedImage(faults.NOT_A_FILE, "a device, a pipe or a socket")
        path, text = Path(self.folder, entry.path), entry.text
        notes: tuple[Kind, ...] = ()
        if text is None and entry.caption_file:
            text, notes = _read_caption(sidecar_path(path, entry.caption_file, ".txt"))
        if text is None and self.has_text:
            notes = (*notes, Kind.NO_CAPTION)
        vector = None
        if self.reads_vectors and (read_vector := _entry_vector(self.folder, entry)) is not None:
            vector = read_vector()
        label = NO_LABEL if entry.label is None else self.label_ids.get(entry.label, NO_LABEL)
        return Record(path, label, text, vector, notes, self._condition(entry))

    def _condition(self, entry: Entry) -> Path | None:
        if entry.condition is None:
            return None
        path, size, _ = entry.condition
        if size == NOT_A_FILE:
            raise faults.of_condition(RejectedImage(faults.NOT_A_FILE, "a device, a pipe or a socket"), path)
        return Path(self.condition_folder, path)


def _entry_vector(folder: str | Path, entry: Entry) -> Callable[[], np.ndarray] | None:
    """A function that reads it; None for an entry that has none."""
    vector, file = entry.vector, entry.vector_file
    if vector is not None:
        return lambda: np.frombuffer(vector, np.float32)
    if not file:
        return None
    return lambda: _read_npy(sidecar_path(Path(folder, entry.path), file, ".npy"))


def _read_npy(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return parse_npy(file.read(MAX_VECTOR_BYTES))
    except OSError as error:
        raise RejectedImage(faults.BAD_VECTOR, f"{path.name}: {error.strerror}") from None


def _read_caption(path: Path) -> tuple[str | None, tuple[Kind, ...]]:
    """The text of a caption file, and what is to be counted about it. Raises `RejectedImage`: bad_caption."""
    try:
        content = path.read_bytes()
    except OSError:  # gone since the listing: the next one sees that
        return None, ()
    return read_caption(content, path.name)


def _identity(entries: Iterable[Entry]) -> str:
    digest, separator = hashlib.blake2b(digest_size=8), ""
    for entry in entries:
        digest.update(path_bytes(separator + repr(entry.identity)))
        separator = "\n"
    return digest.hexdigest()
