"""Images in the rows of Parquet files: read by row group, forwards, with little of one in memory at a time."""

import bisect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainkit.data import faults
from trainkit.data.account import Account, Kind
from trainkit.data.faults import RejectedImage
from trainkit.data.sources import records
from trainkit.data.sources.entries import ReadOptions
from trainkit.data.sources.hub import Columns, caption_column, class_names, label_id
from trainkit.data.sources.locations import DataFile, open_file, opened
from trainkit.data.sources.metadata import ColumnOptions
from trainkit.data.sources.records import Record, Unit, digest, first_length
from trainkit.data.sources.splits import choose_split
from trainkit.data.sources.texts import caption_text
from trainkit.data.sources.vectors import as_vector
from trainkit.errors import UserError

IMAGE_NAMES = ("image", "img", "images", "picture", "jpg", "png", "webp", "bytes")
BATCH_ROWS = 32  # decoded at a time
BUFFER_BYTES = 2**20  # read at a time of a column


class Row(NamedTuple):
    file: int
    number: int  # of the file's rows


@dataclass(frozen=True)
class Rows(Sequence):
    """Rows of one file that lie side by side."""

    file: int
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return Rows(self.file, self.numbers[place])
        return Row(self.file, self.numbers[place])


class ParquetFiles:
    """The rows of Parquet files that have one schema."""

    def __init__(
        self, files: list[DataFile], name: str, options: ReadOptions, patterns: dict[str, list[str]] | None = None
    ):
        self.name, self.account = name, Account()
        names = [file.name for file in files]
        rule = choose_split(lambda: names, options.split, name, self.account, patterns=patterns)
        self.files = [file for file in files if rule is None or rule(file.name) == options.split]
        try:
            self._list(options)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--train_data_dir {name}: labels or vectors cannot be read ({reason})") from None

    def _list(self, options: ReadOptions) -> None:
        files, name = self.files, self.name
        self.columns = None
        self._group_rows, labels = [], []
        for file in files:
            parquet = _open(file)
            first = self.columns is None
            account = self.account if first else Account()
            columns, known_names = _find_columns(parquet.schema_arrow, options.columns, file, account)
            if first:
                self.columns, self.label_names = columns, known_names
            elif (columns, known_names) != (self.columns, self.label_names):
                raise UserError(f"{file.location.path} has other columns or classes than {files[0].location.path}")
            metadata = parquet.metadata
            self._group_rows.append([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
            if columns.label and known_names is None:
                labels += _distinct(parquet, columns.label)
        self._label_ids = None
        if self.columns.label and self.label_names is None:
            self.label_names = class_names(labels, self.account, self.columns.label)
            self._label_ids = {label: number for number, label in enumerate(self.label_names or ())}
        self.has_text = self.columns.text is not None
        self.vector_length = None
        if self.columns.vector:
            self.vector_length = first_length(lambda v=value: as_vector(v) for value in self._vectors())
        if len(self) == 0:
            raise UserError(f"--train_data_dir {name}: the Parquet files hold no row")
        about = [(file.name, file.stamp, rows) for file, rows in zip(files, self._group_rows, strict=True)]
        self.fingerprint = digest(repr((about, tuple(self.columns))).encode())

    def __len__(self) -> int:
        return sum(map(sum, self._group_rows))

    @property
    def reader(self) -> "ParquetReader":
        return ParquetReader(tuple(self.files), self.columns, self._label_ids)

    def units(self) -> list[Unit]:
        """Row groups of one file, small ones together, large ones divided."""
        units, size = [], records.UNIT_ITEMS
        for number, (file, group_rows) in enumerate(zip(self.files, self._group_rows, strict=True)):
            ends = np.cumsum(group_rows).tolist()
            first = 0
            while ends and first < ends[-1]:
                whole = bisect.bisect_right(ends, first + size)  # row groups that end by then
                last = ends[whole - 1] if whole and ends[whole - 1] > first else min(first + size, ends[-1])
                identity = (file.name, file.stamp, tuple(self.columns), first, last)
                units.append(Unit(digest(repr(identity).encode()), Rows(number, range(first, last))))
                first = last
        return units

    def _vectors(self) -> Iterator[Any]:
        for file in self.files:
            for batch in _open(file).iter_batches(BATCH_ROWS, columns=[self.columns.vector]):
                yield from batch.column(0).to_pylist()


class ParquetReader(NamedTuple):
    files: tuple[DataFile, ...]
    columns: Columns
    label_ids: dict[str, int] | None

    def name(self, item: Row) -> str:
        row = f"row {item.number}"
        return f"{self.files[item.file].name} {row}" if len(self.files) > 1 else row

    def read(self, item: Row) -> Record:
        file = self.files[item.file]
        try:
            forward = opened(_Forward, file.location)
            image, label, text, vector = forward.row(item.number, self.columns)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, EOFError) as error:
            raise RejectedImage(
                faults.CORRUPT, f"its row group cannot be read: {' '.join(str(error).split())}"
            ) from None
        except FileNotFoundError:
            raise RejectedImage(faults.MISSING, "the file is not there any more") from None
        except OSError as error:  # Arrow tells damaged pages so, too
            if error.errno is None:
                raise RejectedImage(faults.CORRUPT, " ".join(str(error).split())[:300]) from None
            raise RejectedImage(faults.UNREADABLE, error.strerror or str(error)) from None
        content = image.get("bytes") if isinstance(image, dict) else image
        return Record(content, label_id(label, self.label_ids), caption_text(text), as_vector(vector))


class _Forward:
    """One file's rows, read forwards; going back starts the row group again."""

    def __init__(self, location):
        self._parquet = pq.ParquetFile(open_file(location), buffer_size=BUFFER_BYTES)
        metadata = self._parquet.metadata
        self._ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
        self._group, self._batches, self._start, self._batch = None, iter(()), 0, None

    def row(self, number: int, columns: Columns) -> list[Any]:
        group = int(np.searchsorted(self._ends, number, side="right"))
        row = number - (int(self._ends[group - 1]) if group else 0)
        try:
            if (group, columns) != self._group or row < self._start:
                names = [name for name in columns if name]
                self._batches = self._parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=names)
                self._group, self._start, self._batch = (group, columns), 0, next(self._batches)
            while row >= self._start + self._batch.num_rows:
                self._start += self._batch.num_rows
                self._batch = next(self._batches)
        except BaseException as error:
            self._group = None
            if isinstance(error, StopIteration):
                raise EOFError("it has fewer rows than its header says") from None
            raise
        return [self._batch.column(name)[row - self._start].as_py() if name else None for name in columns]


def _open(file: DataFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(open_file(file.location))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--train_data_dir {file.location.path} is no whole Parquet file ({reason})") from None


def _distinct(parquet: pq.ParquetFile, column: str) -> list:
    found = []
    for group in range(parquet.num_row_groups):
        values = parquet.read_row_group(group, columns=[column]).column(column)
        if pa.types.is_nested(values.type):
            return [[]]  # lists and structs are not classes
        found += values.unique().to_pylist()
    return found


def _find_columns(
    schema: pa.Schema, options: ColumnOptions, file: DataFile, account: Account
) -> tuple[Columns, list[str] | None]:
    """Which column holds what, and the class names that the `datasets` library left in the file."""
    features, where = _features(schema), file.name
    images = [name for name in schema.names if _is_image(schema.field(name).type)]
    named = [name for name in images if features.get(name, {}).get("_type") == "Image"]
    images = sorted(named or images, key=lambda name: IMAGE_NAMES.index(name) if name in IMAGE_NAMES else 99)
    if not images:
        names = ", ".join(schema.names)
        raise UserError(f"--train_data_dir {file.location.path} has no column of images (bytes); it has {names}")
    classes = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    classes = [name for name in sorted(classes, key=lambda name: name != "label") if name in schema.names]
    label = classes[0] if classes else "label" if "label" in schema.names else None
    texts = [name for name in schema.names if _is_caption(schema.field(name))]
    text = caption_column(texts, options, account, where)
    is_vector = options.vector in schema.names and _is_vector(schema.field(options.vector).type)
    vector = options.vector if is_vector else None
    if vector is None and options.vector != "vector":
        raise UserError(f"--vector_column {options.vector} is no column of lists of numbers in {file.location.path}")
    columns = Columns(images[0], label, text, vector)
    for name in schema.names:
        if name not in columns:
            account.add(Kind.COLUMN_NOT_USED, f"{name} of {where}")
    return columns, list(features[label]["names"]) if classes else None


def _features(schema: pa.Schema) -> dict[str, dict]:
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_caption(field: pa.Field) -> bool:
    kind = field.type
    return _is_text(kind) or ((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_text(kind.value_type))


def _is_vector(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))
