"""Where images come from: a folder of files, or a dataset that `datasets` understands.

A source lists itself without opening an image, cuts that listing into work units, and gives a small picklable
`reader` with which any process names a unit's items and turns them into `Record`s.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainkit.data.limits import RejectedImage
from trainkit.data.listing import Entry, list_folder
from trainkit.data.metadata import CAPTION_COLUMNS, caption_lines
from trainkit.data.vectors import MAX_VECTOR_BYTES, as_vector, parse_npy
from trainkit.errors import UserError

UNIT_ITEMS = 2048  # mean length of a work unit
NO_LABEL = -1  # ClassLabel of an image whose class nobody told


class Record(NamedTuple):
    """One image on its way to the decoder. `image`: path, bytes, or None where the source holds no image.

    As an array it is (height, width, channels), uint8 or uint16, or floats in [0, 1].
    """

    image: Path | bytes | np.ndarray | None
    label: int
    text: str | None
    vector: np.ndarray | None = None  # float32


class Unit(NamedTuple):
    """A run of items that becomes one shard; `identity` changes whenever one of its items does."""

    identity: str
    items: Sequence


class ImageFolder:
    """Image files under a folder, recursively; class folders, metadata files and NAME.txt captions are understood."""

    def __init__(self, folder: str | Path, flag: str = "--train_data_dir", vector_column: str = "vector"):
        self.folder = Path(folder)
        self.name = self.folder.resolve().name or "images"
        self.entries, labels, self.has_text, has_vector = list_folder(self.folder, flag, vector_column)
        self.label_names = sorted_labels(labels) if labels else None
        vectors = (_entry_vector(self.folder, entry) for entry in self.entries) if has_vector else ()
        self.vector_length = first_length(vectors)
        self.fingerprint = _identity(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def reader(self) -> "FolderReader":
        label_ids = {name: number for number, name in enumerate(self.label_names or ())}
        return FolderReader(str(self.folder.resolve()), label_ids)

    def units(self) -> list[Unit]:
        parts = [self.entries.part(*bounds) for bounds in cuts(self.entries.paths(), UNIT_ITEMS)]
        return [Unit(_identity(part), part) for part in parts]


class FolderReader(NamedTuple):
    folder: str
    label_ids: dict[str, int]

    def name(self, entry: Entry) -> str:
        return entry.path

    def read(self, entry: Entry) -> Record:
        path, text = Path(self.folder, entry.path), entry.text
        if text is None and entry.caption_file:
            text = _read_caption(path.with_suffix(".txt"))
        vector = None
        if entry.vector is not None or entry.vector_file:
            vector = _entry_vector(self.folder, entry)()
        return Record(path, self.label_ids.get(entry.label, NO_LABEL), text, vector)


def _entry_vector(folder: str | Path, entry: Entry) -> Callable[[], np.ndarray] | None:
    """A function that reads it; None for an entry that has none."""
    if entry.vector is not None:
        return lambda: np.frombuffer(entry.vector, np.float32)
    return (lambda: _read_npy(Path(folder, entry.path).with_suffix(".npy"))) if entry.vector_file else None


def _read_npy(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return parse_npy(file.read(MAX_VECTOR_BYTES))
    except OSError as error:
        raise RejectedImage("bad_vector", f"{path.name}: {error.strerror}") from None


def first_length(vectors: Iterable[Callable[[], np.ndarray] | None]) -> int | None:
    """Length of the first vector that can be read: the others must be like it.

    None where nothing has a vector, 0 where no vector can be read.
    """
    length = None
    for read in vectors:
        if read is not None:
            length = 0
            with contextlib.suppress(RejectedImage):
                if len(vector := read()):
                    return len(vector)
    return length


def _read_caption(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # gone since the listing: the next one tells it apart
        return None


def cut_by_name(entries: list[Entry], mean: int) -> Iterator[list[Entry]]:
    """The runs of `cuts`, as lists."""
    return (entries[start:stop] for start, stop in cuts((entry.path for entry in entries), mean))


def cuts(paths: Iterable[str], mean: int) -> Iterator[tuple[int, int]]:
    """Cut a sorted listing into runs of about `mean`, of at least half and at most four times as many: (start, stop).

    A run ends where a hash of the path says so, not at a count: an added file changes its own run, no other.
    """
    start, stop = 0, 0
    for stop, path in enumerate(paths, 1):
        count = stop - start
        if count < mean // 2:
            continue
        path_hash = hashlib.blake2b(_bytes(path), digest_size=8).digest()
        if count == 4 * mean or int.from_bytes(path_hash, "little") % (mean - mean // 2) == 0:
            yield start, stop
            start = stop
    if start < stop:
        yield start, stop


def sorted_labels(names: set[str]) -> list[str]:
    """By number where all are whole numbers, else by name."""
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def _identity(entries: Iterable[Entry]) -> str:
    digest, separator = hashlib.blake2b(digest_size=8), ""
    for entry in entries:
        digest.update(_bytes(separator + repr(tuple(entry))))
        separator = "\n"
    return digest.hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # file names need not be UTF-8


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


class HubDataset:
    """A dataset of the Hub, a folder of `save_to_disk`, or a local folder that `load_dataset` understands."""

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        cache_dir: str | None = None,
        flag: str = "--dataset_name",
        vector_column: str = "vector",
    ):
        dataset = _load(name, config, split, cache_dir, flag)
        columns = _image_columns(dataset)
        if not columns:
            raise UserError(f"{flag} {name} has no image column; its columns: {', '.join(dataset.features)}")
        self.name = Path(name).name
        self.fingerprint = dataset._fingerprint
        self.columns = Columns(
            columns[0],
            _label_column(dataset),
            next((name for name in CAPTION_COLUMNS if _is_caption(dataset.features.get(name))), None),
            _vector_column(dataset, vector_column),
        )
        self.label_names, self._label_ids = _labels(dataset, self.columns.label)
        self.has_text = self.columns.text is not None
        kept = dataset.select_columns([column for column in self.columns if column])
        self._dataset = kept.cast_column(self.columns.image, _undecoded_image())
        vectors = self._dataset.select_columns([self.columns.vector]) if self.columns.vector else ()
        self.vector_length = first_length((lambda row=row: as_vector(row[self.columns.vector])) for row in vectors)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def reader(self) -> "DatasetReader":
        return DatasetReader(self._dataset, self.columns, self._label_ids)

    def units(self) -> list[Unit]:
        rows = range(len(self))
        ranges = [rows[start : start + UNIT_ITEMS] for start in range(0, len(self), UNIT_ITEMS)]
        return [Unit(f"{self.fingerprint} {tuple(self.columns)} {part.start} {part.stop}", part) for part in ranges]


class Columns(NamedTuple):
    """Which columns of a table hold what."""

    image: str
    label: str | None = None
    text: str | None = None
    vector: str | None = None


class DatasetReader(NamedTuple):
    dataset: "object"  # datasets.Dataset; pickles as paths where it is memory-mapped
    columns: Columns
    label_ids: dict | None  # where the labels are no class numbers yet

    def name(self, row: int) -> str:
        return f"row {row}"

    def read(self, row: int) -> Record:
        item = self.dataset[row]
        image, label, text, vector = (item[column] if column else None for column in self.columns)
        content = (image or {}).get("bytes")
        if content is None and (image or {}).get("path"):
            content = Path(image["path"])
        return Record(content, label_id(label, self.label_ids), caption_lines(text), as_vector(vector))


def label_id(label, label_ids: dict | None) -> int:
    """The class number of a label as a table holds it, -1 for none."""
    if label is None:
        return NO_LABEL
    return label_ids.get(str(label), NO_LABEL) if label_ids is not None else label


def _load(name: str, config: str | None, split: str, cache_dir: str | None, flag: str):
    import datasets  # slow to import

    if os.environ.get("LOCAL_RANK", "0") != "0":
        datasets.disable_progress_bars()
    try:
        if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, datasets.Dataset):
                return loaded
            if split not in loaded:
                raise UserError(f"--dataset_split {split} is not in {name}; it has {', '.join(loaded)}")
            return loaded[split]
        return datasets.load_dataset(name, config, split=split, cache_dir=cache_dir)
    except UserError:
        raise
    except Exception as error:  # each builder raises its own
        raise UserError(_loading_message(f"{flag} {name}", split, error)) from error


def _loading_message(what: str, split: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    if "split" in reason.lower():
        return f"--dataset_split {split} of {what}: {reason}"
    if "config name" in reason.lower() or "BuilderConfig" in reason:
        return f"--dataset_config_name for {what}: {reason}"
    hint = "check the spelling, the network (HF_ENDPOINT, HF_HUB_OFFLINE) and, if it is private, `hf auth login`"
    return f"{what} cannot be loaded ({reason}): {hint}"


def _image_columns(dataset) -> list[str]:
    import datasets

    found = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    return sorted(found, key=lambda name: name not in ("image", "img"))


def _label_column(dataset) -> str | None:
    """A ClassLabel column, named `label` rather than otherwise; else one of numbers or words that is named so."""
    import datasets

    found = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    if not found and re.match("u?int|string|large_string", getattr(dataset.features.get("label"), "dtype", "")):
        return "label"
    return next(iter(sorted(found, key=lambda name: name != "label")), None)


def _labels(dataset, column: str | None) -> tuple[list[str] | None, dict[str, int] | None]:
    """Class names, and the numbers of labels that are not such numbers already."""
    if column is None:
        return None, None
    if hasattr(dataset.features[column], "names"):
        return list(dataset.features[column].names), None
    names = sorted_labels({str(value) for value in dataset.unique(column) if value is not None})
    return names, {name: number for number, name in enumerate(names)}


def _vector_column(dataset, wanted: str) -> str | None:
    feature = dataset.features.get(wanted)
    dtype = getattr(getattr(feature, "feature", None), "dtype", "")
    return wanted if re.match("u?int|float", dtype) else None


def _is_string(feature) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _is_caption(feature) -> bool:
    return _is_string(feature) or _is_string(getattr(feature, "feature", None))


def _undecoded_image():
    import datasets

    return datasets.Image(decode=False)


def open_source(options):
    """The source that a script's options (`SourceOptions`) name. Raises `UserError`."""
    vector_column = options.vector_column
    if options.dataset_name is not None:
        downloads = None if options.cache_dir is None else str(Path(options.cache_dir) / "downloads")
        name, config, split = options.dataset_name, options.dataset_config_name, options.dataset_split
        return HubDataset(name, config, split, downloads, vector_column=vector_column)
    if options.train_data_dir is None:
        raise UserError("give --train_data_dir FOLDER or --dataset_name NAME: where the images come from")
    folder = Path(options.train_data_dir.removeprefix("file://"))
    if (folder / "preparation.json").is_file():
        raise UserError(f"--train_data_dir {folder} is a prepared dataset already; train on it, or give raw images")
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        flag, split = "--train_data_dir", options.dataset_split
        return HubDataset(str(folder), None, split, flag=flag, vector_column=vector_column)
    from trainkit.data.opening import open_files  # it stands on this module

    return open_files(options) or ImageFolder(folder, vector_column=vector_column)
