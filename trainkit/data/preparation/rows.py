"""Rows of Arrow record batches: selected, ordered, and grouped again by the rows alone."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa


class Rows:
    """The rows of several record batches as one sequence; `positions` gives the place of each in it."""

    def __init__(self, batches: Sequence[pa.RecordBatch], positions: np.ndarray | None = None):
        self.batches = list(batches)
        counts = [batch.num_rows for batch in self.batches]
        self._batch = np.repeat(np.arange(len(counts)), counts)
        self._row = np.concatenate([np.arange(count) for count in counts] or [np.arange(0)])
        if positions is not None:
            order = np.argsort(positions)
            self._batch, self._row = self._batch[order], self._row[order]

    def __len__(self) -> int:
        return len(self._batch)

    def column(self, name: str) -> list:
        """Return one column's values as Python objects."""
        columns = [batch.column(name).to_pylist() for batch in self.batches]
        return [columns[batch][row] for batch, row in zip(self._batch, self._row, strict=True)]

    def take(self, wanted: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Yield the `wanted` rows in that order; a run of rows from one batch is one batch."""
        batch, row = self._batch[wanted], self._row[wanted]
        starts = np.flatnonzero(np.diff(batch, prepend=-1))
        for start, end in itertools.pairwise([*starts, len(batch)]):
            run = row[start:end]
            if run[-1] - run[0] == len(run) - 1 and (np.diff(run) == 1).all():
                yield self.batches[batch[start]].slice(run[0], len(run))
            else:
                yield self.batches[batch[start]].take(pa.array(run))


def rebatch(batches: Iterable[pa.RecordBatch], max_bytes: int) -> Iterator[pa.RecordBatch]:
    """Yield the same rows in batches of at most `max_bytes` of images, which are fast to index.

    A larger image has a batch of its own. Where a batch ends depends on the rows alone, not on the given batches.
    """
    group: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        ends = np.cumsum(_image_bytes(batch))
        start = done = 0
        while start < batch.num_rows:
            end = int(np.searchsorted(ends, done + max_bytes - size, side="right"))
            if end <= start and not group:
                end = start + 1
            if end > start:
                group.append(batch.slice(start, end - start))
                size += int(ends[end - 1]) - done
                start, done = end, int(ends[end - 1])
            if start < batch.num_rows:
                yield _joined(group)
                group, size = [], 0
    if group:
        yield _joined(group)


def _joined(group: list[pa.RecordBatch]) -> pa.RecordBatch:
    # The empty batch forces a copy even of a single batch, whose buffers may hold more than its rows.
    return pa.Table.from_batches([*group, group[0].slice(0, 0)]).combine_chunks().to_batches()[0]


def _image_bytes(batch: pa.RecordBatch) -> np.ndarray:
    """Return the bytes of each row's image (N,), pixels or encoded."""
    import pyarrow.compute as pc  # slow to import

    images = batch.column("image")
    if pa.types.is_struct(images.type):
        return pc.binary_length(images.field("bytes")).to_numpy(zero_copy_only=False)
    sample = images.type.value_type.bit_width // 8
    if pa.types.is_fixed_size_list(images.type):
        return np.full(len(images), images.type.list_size * sample)
    return pc.list_value_length(images).to_numpy(zero_copy_only=False) * sample
