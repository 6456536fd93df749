"""Datasets of the Hub, or saved on disk by `datasets`, as a source."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from trainkit.data.account import Account, Kind
from trainkit.data.sources import records
from trainkit.data.sources.columns import Columns, Labels, class_labels, find_table_columns, read_row, table_features
from trainkit.data.sources.entries import ReadOptions
from trainkit.data.sources.records import Record, Unit, first_length
from trainkit.data.sources.splits import ALL
from trainkit.data.sources.vectors import as_vector
from trainkit.errors import UserError, one_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SCANNED_ROWS = 2**13  # of labels, read at once


class HubDataset:
    """A dataset of the Hub, a folder of `save_to_disk`, or a local folder that `load_dataset` understands."""

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        cache_dir: str | None = None,
        flag: str = "--dataset_name",
        options: ReadOptions | None = None,
    ):
        options, self.account = options or ReadOptions(), Account()
        dataset = _load(name, config, split, cache_dir, flag, self.account)
        self.name, schema = Path(name).name, dataset.features.arrow_schema
        self.columns = find_table_columns(schema, options.columns, self.account, self.name, f"{flag} {name}")
        self.fingerprint = dataset._fingerprint
        self.account.add(Kind.ROWS_FOUND, count=len(dataset))
        self.labels = class_labels(schema, self.columns.label, _parts(dataset, self.columns), self.account, self.name)
        self.label_names, self.has_text = self.labels.names, self.columns.text is not None
        self.pairs = options.pairs if self.columns.condition else None
        self._dataset = dataset.select_columns([column for column in self.columns if column])
        for column in (self.columns.image, self.columns.condition):
            if column is not None and table_features(schema).get(column, {}).get("_type") == "Image":
                self._dataset = self._dataset.cast_column(column, _undecoded_image())
        self._folder = Path(name) if Path(name).is_dir() else None
        vectors = self._dataset.select_columns([self.columns.vector]) if self.columns.vector else ()
        self.vector_length = first_length(partial(as_vector, row[self.columns.vector]) for row in vectors)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def reader(self) -> "DatasetReader":
        return DatasetReader(self._dataset, self.columns, self.labels, self._folder)

    def units(self) -> list[Unit]:
        rows = range(len(self))
        ranges = [rows[start : start + records.UNIT_ITEMS] for start in range(0, len(self), records.UNIT_ITEMS)]
        return [Unit(f"{self.fingerprint} {self.columns.identity} {part.start} {part.stop}", part) for part in ranges]


class DatasetReader(NamedTuple):
    dataset: "Dataset"  # pickles as paths if it is memory-mapped
    columns: Columns
    labels: Labels
    folder: Path | None  # that relative paths of images start from

    def name(self, row: int) -> str:
        return f"row {row}"

    def read(self, row: int) -> Record:
        item = self.dataset[row]
        values = tuple(item[column] if column else None for column in self.columns)
        record = read_row(self.columns, self.labels, values)
        if isinstance(record.image, str):
            record = record._replace(image=self._path(record.image))
        if isinstance(record.condition, str):
            record = record._replace(condition=self._path(record.condition))
        return record

    def _path(self, name: str) -> Path:
        path = Path(name)
        is_below = self.folder is not None and not path.is_absolute() and (self.folder / path).exists()
        return self.folder / path if is_below and self.folder else path


def _load(name: str, config: str | None, split: str, cache_dir: str | None, flag: str, account: Account) -> "Dataset":
    """The split of a dataset. Other splits are added to `account`. Raises `UserError`."""
    import datasets  # slow to import

    if os.environ.get("LOCAL_RANK", "0") != "0":
        datasets.disable_progress_bars()
    try:
        if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
            return _saved_split(datasets.load_from_disk(name), name, split, account)
        loaded = datasets.load_dataset(name, config, split=split, cache_dir=cache_dir)
    except UserError:
        raise
    except Exception as error:  # each builder raises its own
        raise UserError(_loading_message(f"{flag} {name}", split, error)) from error
    rows = {other: info.num_examples or 0 for other, info in (loaded.info.splits or {}).items()}
    _count_other_splits(rows, split, account)
    return loaded


def _saved_split(saved: "Dataset | DatasetDict", name: str, split: str, account: Account) -> "Dataset":
    """One split of what `load_from_disk` gave. Raises `UserError` if it is not there."""
    import datasets

    if isinstance(saved, datasets.Dataset):
        if split not in (ALL, "train", str(saved.split)):
            raise UserError(f"--dataset_split {split} is not in {name}, which holds a single split ({saved.split})")
        return saved
    if split == ALL:
        return datasets.concatenate_datasets(list(saved.values()))
    if split not in saved:
        raise UserError(f"--dataset_split {split} is not in {name}; it has {', '.join(saved)}")
    _count_other_splits({other: len(part) for other, part in saved.items()}, split, account)
    return saved[split]


def _count_other_splits(rows: dict[str, int], split: str, account: Account) -> None:
    if split in rows:
        for other, count in rows.items():
            if other != split:
                account.add(Kind.OTHER_SPLIT_ROWS, f"{other} ({count:,})", count)


def _loading_message(what: str, split: str, error: Exception) -> str:
    reason = one_line(error)
    if "split" in reason.lower():
        return f"--dataset_split {split} of {what}: {reason}"
    if "config name" in reason.lower() or "BuilderConfig" in reason:
        return f"--dataset_config_name for {what}: {reason}"
    hint = "check the spelling, the network (HF_ENDPOINT, HF_HUB_OFFLINE) and, if it is private, `hf auth login`"
    return f"{what} cannot be loaded ({reason}): {hint}"


def _parts(dataset: "Dataset", columns: Columns) -> Iterator[pa.ChunkedArray]:
    """The column of labels in parts."""
    table = dataset.select_columns([columns.label]).with_format("arrow")
    for part in table.iter(SCANNED_ROWS):
        yield part.column(0)


def _undecoded_image():
    import datasets

    return datasets.Image(decode=False)
