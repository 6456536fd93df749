"""A dataset that `datasets` understands as a source: one of the Hub, or saved on the disk."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from trainkit.data.account import Account, Kind
from trainkit.data.format import NO_LABEL
from trainkit.data.sources import records
from trainkit.data.sources.entries import ReadOptions
from trainkit.data.sources.metadata import CAPTION_COLUMNS, ColumnOptions, find_columns, normal_name
from trainkit.data.sources.records import Record, Unit, first_length, sorted_labels
from trainkit.data.sources.texts import NotAClass, caption_text, class_name
from trainkit.data.sources.vectors import as_vector
from trainkit.errors import UserError


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
        dataset = _load(name, config, split, cache_dir, flag)
        columns = _image_columns(dataset)
        if not columns:
            raise UserError(f"{flag} {name} has no image column; its columns: {', '.join(dataset.features)}")
        self.name = Path(name).name
        self.fingerprint = dataset._fingerprint
        texts = [name for name, feature in dataset.features.items() if _is_caption(feature)]
        label, vector = _label_column(dataset), _vector_column(dataset, options.columns.vector)
        text = caption_column(texts, options.columns, self.account, Path(name).name)
        self.columns = Columns(columns[0], label, text, vector)
        for column in set(dataset.features) - set(self.columns):
            self.account.add(Kind.COLUMN_NOT_USED, f"{column} of {Path(name).name}")
        self.label_names, self._label_ids = _labels(dataset, self.columns.label, self.account)
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
        ranges = [rows[start : start + records.UNIT_ITEMS] for start in range(0, len(self), records.UNIT_ITEMS)]
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
        return Record(content, label_id(label, self.label_ids), caption_text(text), as_vector(vector))


def label_id(label, label_ids: dict | None) -> int:
    """The class number of a label as a table holds it, -1 for none."""
    if label_ids is None:
        return NO_LABEL if label is None else label
    try:
        return label_ids.get(class_name(label), NO_LABEL)
    except NotAClass:
        return NO_LABEL


def class_names(values: Iterable, account: Account, where: str) -> list[str] | None:
    """The sorted classes among the distinct `values` of a label column; None without any."""
    names = set()
    for value in values:
        try:
            names.add(class_name(value))
        except NotAClass as error:
            account.add(Kind.LABEL_NOT_A_CLASS, f"{where}: {error}")
    return sorted_labels(names - {None}, account) or None


def caption_column(names: list[str], options: ColumnOptions, account: Account, where: str) -> str | None:
    """The caption column of a table among the `names` of its text columns. Raises `UserError`."""
    found = find_columns(names, ColumnOptions("", options.caption), Account(), where).captions
    if found and normal_name(found[0]) not in CAPTION_COLUMNS and found[0] != options.caption:
        account.add(Kind.COLUMN_ALIAS, f"{found[0]} as captions in {where}")
    return next(iter(found), None)


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
    if not found and isinstance(dataset.features.get("label"), datasets.Value):
        return "label"
    return next(iter(sorted(found, key=lambda name: name != "label")), None)


def _labels(dataset, column: str | None, account: Account) -> tuple[list[str] | None, dict[str, int] | None]:
    """Class names, and the numbers of labels that are not such numbers already."""
    if column is None:
        return None, None
    if hasattr(dataset.features[column], "names"):
        return list(dataset.features[column].names), None
    names = class_names(dataset.unique(column), account, column)
    return names, {name: number for number, name in enumerate(names or ())}


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
