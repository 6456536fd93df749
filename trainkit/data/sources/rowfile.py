"""Rows that memory should not hold: kept in a temporary file, read by number, sorted a run at a time."""

import bisect
import heapq
import os
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import itemgetter

import pyarrow as pa

from trainkit.atomic import temporary_folder
from trainkit.errors import UserError

RUN_ROWS = 2**16  # sorted in memory at one go
BATCH_ROWS = 2**11  # read at one go
MERGED_ROWS = 2**8  # read at one go of each run that is being merged: there may be thousands


class RowFile:
    """A file of rows (tuples, as `schema` types them) that is only ever added to; it is gone with the process.

    It is stored in `temporary_folder`, and has no name.
    """

    def __init__(self, schema: pa.Schema, batch_rows: int | None = None):
        self._schema, self._batch_rows = schema, batch_rows or BATCH_ROWS
        self._folder = temporary_folder()
        self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)
        self._starts: list[int] = []  # the first row of each batch
        self._places: list[tuple[int, int]] = []  # its offset and length in bytes
        self._num_rows = self._end = 0

    def __len__(self) -> int:
        return self._num_rows

    def extend(self, rows: Iterable[tuple]) -> None:
        rows = iter(rows)
        while batch := list(islice(rows, self._batch_rows)):
            columns = [
                pa.array(column, field.type)
                for column, field in zip(zip(*batch, strict=True), self._schema, strict=True)
            ]
            content = pa.record_batch(columns, schema=self._schema).serialize()
            self._write(content)
            self._starts.append(self._num_rows)
            self._places.append((self._end, content.size))
            self._num_rows += len(batch)
            self._end += content.size

    def _write(self, content: pa.Buffer) -> None:
        """Write all of it: a nearly full disk takes a part. Raises `UserError` if there is no room."""
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise UserError(
                f"the list of files cannot be written to {self._folder} ({error.strerror}): make room there, or "
                "set TMPDIR to a folder on another disk"
            ) from None

    def rows(self, start: int, stop: int) -> Iterator[tuple]:
        """Rows `start` to `stop` - 1."""
        number = max(bisect.bisect_right(self._starts, start) - 1, 0)
        while start < stop:
            offset, length = self._places[number]
            content = pa.py_buffer(os.pread(self._file.fileno(), length, offset))
            batch = pa.ipc.read_record_batch(content, self._schema)
            first = self._starts[number]
            batch = batch.slice(start - first, stop - start)
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
            start += batch.num_rows
            number += 1


def sorted_rows(rows: Iterable[tuple], schema: pa.Schema) -> Iterator[tuple]:
    """`rows` in the order of their first column; those that are equal in it keep their order."""
    rows, key = iter(rows), itemgetter(0)
    run = sorted(islice(rows, RUN_ROWS), key=key)
    if len(run) < RUN_ROWS:
        yield from run
        return
    file, bounds = RowFile(schema, MERGED_ROWS), [0]
    while run:
        file.extend(run)
        bounds.append(len(file))
        run = sorted(islice(rows, RUN_ROWS), key=key)
    yield from heapq.merge(*map(file.rows, bounds, bounds[1:]), key=key)
