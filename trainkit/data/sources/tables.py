"""Images in the rows of Parquet files, read forwards by row group with few rows in memory at a time."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainkit.data import faults
from trainkit.data.account import Account, Kind
from trainkit.data.faults import RejectedImage
from trainkit.data.sources import records
from trainkit.data.sources.columns import (
    Columns,
    Labels,
    class_labels,
    find_table_columns,
    holds_paths,
    read_row,
    table_features,
)
from trainkit.data.sources.entries import ReadOptions, size_and_time
from trainkit.data.sources.locations import DataFile, Location, is_url, open_file, opened, read_whole
from trainkit.data.sources.records import Record, Unit, digest, first_length
from trainkit.data.sources.vectors import as_vector
from trainkit.errors import UserError, one_line

BATCH_ROWS = 32  # decoded at once
BUFFER_BYTES = 2**20  # of a column, read at once


class Row(NamedTuple):
    file: int
    number: int  # of the file's rows


@dataclass(frozen=True)
class Rows(Sequence):
    """Consecutive rows of one file."""

    file: int
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return Rows(self.file, self.numbers[place])
        return Row(self.file, self.numbers[place])


class ParquetFiles:
    """The rows of Parquet files with the same columns."""

    def __init__(self, files: list[DataFile], name: str, options: ReadOptions):
        self.files, self.name, self.account = files, name, Account()
        try:
            self._list(options)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"--train_data_dir {name}: a column cannot be read ({one_line(error, 200)})") from None

    def _list(self, options: ReadOptions) -> None:
        opened_files = [_open(file) for file in self.files]
        schemas = [parquet.schema_arrow for parquet in opened_files]
        schema, where = _common_schema(schemas), self.files[0].name
        what = f"--train_data_dir {self.files[0].location.path}"
        self.columns = find_table_columns(schema, options.columns, self.account, where, what)
        _check_schemas(self.files, schemas, self.columns)
        self._group_rows = [_group_rows(parquet) for parquet in opened_files]
        if len(self) == 0:
            raise UserError(f"--train_data_dir {self.name}: the Parquet files hold no row")
        self.account.add(Kind.ROWS_FOUND, count=len(self))
        label = self.columns.label
        values = (part for parquet in opened_files for part in _column_parts(parquet, label))
        self.labels = class_labels(schema, label, values, self.account, where)
        self.label_names = self.labels.names
        self.has_text = self.columns.text is not None
        self.vector_length, self.pairs = None, options.pairs if self.columns.condition else None
        if self.columns.vector:
            self.vector_length = first_length(partial(as_vector, value) for value in self._vectors())
        self.has_paths = holds_paths(schema.field(self.columns.image).type)
        for column in (self.columns.image, self.columns.condition):
            if column is not None and holds_paths(schema.field(column).type):
                self.files = [_with_stamps(file, column) for file in self.files]
        about = [(file.name, file.stamp, rows) for file, rows in zip(self.files, self._group_rows, strict=True)]
        self.fingerprint = digest(repr((about, self.columns.identity)).encode())

    def __len__(self) -> int:
        return sum(map(sum, self._group_rows))

    @property
    def reader(self) -> "ParquetReader":
        return ParquetReader(tuple(self.files), self.columns, self.labels)

    def units(self) -> list[Unit]:
        """Row groups of one file, small ones together, large ones split."""
        units, size = [], records.UNIT_ITEMS
        for number, (file, group_rows) in enumerate(zip(self.files, self._group_rows, strict=True)):
            ends = np.cumsum(group_rows).tolist()
            first = 0
            while ends and first < ends[-1]:
                whole = bisect.bisect_right(ends, first + size)  # row groups that end by then
                last = ends[whole - 1] if whole and ends[whole - 1] > first else min(first + size, ends[-1])
                identity = (file.name, file.stamp, self.columns.identity, first, last)
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
    labels: Labels

    def name(self, item: Row) -> str:
        row = f"row {item.number}"
        return f"{self.files[item.file].name} {row}" if len(self.files) > 1 else row

    def read(self, item: Row) -> Record:
        file = self.files[item.file]
        try:
            forward = opened(_Forward, file.location)
            row = forward.row(item.number, self.columns)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, EOFError) as error:
            raise RejectedImage(faults.CORRUPT, f"its row group cannot be read: {one_line(error)}") from None
        except FileNotFoundError:
            raise RejectedImage(faults.MISSING, "the file was removed meanwhile") from None
        except OSError as error:  # pyarrow raises it for damaged pages too, without an errno
            if error.errno is None:
                raise RejectedImage(faults.CORRUPT, one_line(error)) from None
            raise RejectedImage(faults.UNREADABLE, error.strerror or str(error)) from None
        record = read_row(self.columns, self.labels, row)
        if isinstance(record.image, str):
            record = record._replace(image=_image_file(file.location, record.image))
        if isinstance(path := record.condition, str):
            try:
                record = record._replace(condition=_image_file(file.location, path))
            except RejectedImage as error:
                raise faults.of_condition(error, path) from None
        return record


class _Forward:
    """The rows of one file, read forwards; going back starts the row group again."""

    def __init__(self, location: Location):
        self._parquet = pq.ParquetFile(open_file(location), buffer_size=BUFFER_BYTES)
        metadata = self._parquet.metadata
        self._ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
        self._group: tuple[int, Columns] | None = None
        self._batches, self._start = iter(()), 0
        self._batch: Any = None

    def row(self, number: int, columns: Columns) -> tuple[Any, ...]:
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
        return tuple(self._batch.column(name)[row - self._start].as_py() if name else None for name in columns)


def _open(file: DataFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(open_file(file.location))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = one_line(error, 200)
        raise UserError(f"--train_data_dir {file.location.path} is not a whole Parquet file ({reason})") from None


def _group_rows(parquet: pq.ParquetFile) -> list[int]:
    metadata = parquet.metadata
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _common_schema(schemas: list[pa.Schema]) -> pa.Schema:
    """The first schema, with the types of columns that are empty there (null) from the others."""
    schema = schemas[0]
    for number, field in enumerate(schema):
        if pa.types.is_null(field.type):
            others = (other.field(field.name) for other in schemas if field.name in other.names)
            schema = schema.set(number, next((other for other in others if not pa.types.is_null(other.type)), field))
    return schema


def _check_schemas(files: list[DataFile], schemas: list[pa.Schema], columns: Columns) -> None:
    """Raises `UserError` where a file lacks one of the `columns` or has other class names."""
    label = columns.label
    names = [None if label is None else table_features(schema).get(label, {}).get("names") for schema in schemas]
    for file, schema, classes in zip(files, schemas, names, strict=True):
        if not {name for name in columns if name} <= set(schema.names) or classes != names[0]:
            raise UserError(f"{file.location.path} has other columns or classes than {files[0].location.path}")


def _column_parts(parquet: pq.ParquetFile, column: str | None) -> Iterator[pa.ChunkedArray]:
    for group in range(parquet.num_row_groups):
        yield parquet.read_row_group(group, columns=[column]).column(column)


def _image_file(table: Location, path: str) -> Path | bytes:
    """The image whose path a table holds, relative to the table. Raises `RejectedImage`."""
    if not is_url(table.path):
        return Path(table.path).parent / path
    location = table._replace(path=path if is_url(path) else f"{table.path.rpartition('/')[0]}/{path}")
    try:
        return read_whole(location)
    except FileNotFoundError:
        raise RejectedImage(faults.MISSING, f"{path} does not exist") from None
    except Exception as error:  # each store raises its own
        raise RejectedImage(faults.UNREADABLE, one_line(error)) from None


def _with_stamps(file: DataFile, column: str) -> DataFile:
    """`file` with a version that changes with the image files that its `column` names, if they are local."""
    if is_url(file.location.path):
        return file
    folder, version = Path(file.location.path).parent, file.location.version
    for batch in _open(file).iter_batches(2**12, columns=[column]):
        values = batch.column(0).to_pylist()
        paths = (value.get("path") if isinstance(value, dict) else value for value in values)
        stats = [path and size_and_time(folder / path) for path in paths]
        version = digest(repr((version, stats)).encode())
    return file._replace(location=file.location._replace(version=version))
