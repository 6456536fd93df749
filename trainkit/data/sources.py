"""Where images come from: a folder of files, or a dataset that `datasets` understands.

A source lists itself without opening an image, cuts that listing into work units, and gives a small picklable
`reader` with which any process names a unit's items and turns them into `Record`s.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trainkit.data.listing import CAPTION_COLUMNS, Entry, list_folder
from trainkit.errors import UserError

UNIT_ITEMS = 2048  # mean length of a work unit
NO_LABEL = -1  # ClassLabel of an image whose class nobody told


class Record(NamedTuple):
    """One image on its way to the decoder. `image`: path, bytes, or None where the source holds no image."""

    image: Path | bytes | None
    label: int
    text: str | None


class Unit(NamedTuple):
    """A run of items that becomes one shard; `identity` changes whenever one of its items does."""

    identity: str
    items: Sequence


class ImageFolder:
    """Image files under a folder, recursively; class folders, metadata files and NAME.txt captions are understood."""

    def __init__(self, folder: str | Path, flag: str = "--train_data_dir"):
        self.folder = Path(folder)
        self.name = self.folder.resolve().name or "images"
        self.entries, labels, self.has_text = list_folder(self.folder, flag)
        self.label_names = _sorted_labels(labels) if labels else None
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
        return Record(path, self.label_ids.get(entry.label, NO_LABEL), text)


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


def _sorted_labels(names: set[str]) -> list[str]:
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


class HubDataset:
    """A dataset of the Hub, a folder of `save_to_disk`, or a local folder that `load_dataset` understands."""

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        cache_dir: str | None = None,
        flag: str = "--dataset_name",
    ):
        dataset = _load(name, config, split, cache_dir, flag)
        columns = _image_columns(dataset)
        if not columns:
            raise UserError(f"{flag} {name} has no image column; its columns: {', '.join(dataset.features)}")
        self.name = Path(name).name
        self.fingerprint = dataset._fingerprint
        self.label_column = _label_column(dataset)
        self.text_column = next((name for name in CAPTION_COLUMNS if _is_string(dataset.features.get(name))), None)
        self.label_names = list(dataset.features[self.label_column].names) if self.label_column else None
        self.has_text = self.text_column is not None
        self.image_column = columns[0]
        kept = [column for column in (self.image_column, self.label_column, self.text_column) if column]
        self._dataset = dataset.select_columns(kept).cast_column(self.image_column, _undecoded_image())

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def reader(self) -> "DatasetReader":
        return DatasetReader(self._dataset, self.image_column, self.label_column, self.text_column)

    def units(self) -> list[Unit]:
        rows = range(len(self))
        ranges = [rows[start : start + UNIT_ITEMS] for start in range(0, len(self), UNIT_ITEMS)]
        columns = (self.image_column, self.label_column, self.text_column)
        return [Unit(f"{self.fingerprint} {columns} {part.start} {part.stop}", part) for part in ranges]


class DatasetReader(NamedTuple):
    dataset: "object"  # datasets.Dataset; pickles as paths where it is memory-mapped
    image_column: str
    label_column: str | None
    text_column: str | None

    def name(self, row: int) -> str:
        return f"row {row}"

    def read(self, row: int) -> Record:
        item = self.dataset[row]
        image = item[self.image_column] or {}
        content = image.get("bytes")
        if content is None and image.get("path"):
            content = Path(image["path"])
        label = item[self.label_column] if self.label_column else None
        text = item[self.text_column] if self.text_column else None
        return Record(content, NO_LABEL if label is None else label, text)


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
    import datasets

    found = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    return next(iter(sorted(found, key=lambda name: name != "label")), None)


def _is_string(feature) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _undecoded_image():
    import datasets

    return datasets.Image(decode=False)


def open_source(options) -> ImageFolder | HubDataset:
    """The source that a script's options (`SourceOptions`) name. Raises `UserError`."""
    if options.dataset_name is not None:
        downloads = None if options.cache_dir is None else str(Path(options.cache_dir) / "downloads")
        return HubDataset(options.dataset_name, options.dataset_config_name, options.dataset_split, downloads)
    if options.train_data_dir is None:
        raise UserError("give --train_data_dir FOLDER or --dataset_name NAME: where the images come from")
    folder = Path(options.train_data_dir)
    if (folder / "preparation.json").is_file():
        raise UserError(f"--train_data_dir {folder} is a prepared dataset already; train on it, or give raw images")
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return HubDataset(options.train_data_dir, None, options.dataset_split, flag="--train_data_dir")
    return ImageFolder(folder)
