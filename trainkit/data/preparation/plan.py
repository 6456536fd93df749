"""The remaining work of a preparation: slices of work units, and the shards that they are joined into."""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from trainkit.data import faults
from trainkit.data.files import RemotePath, for_each, open_stream, read_schema, sizes
from trainkit.data.preparation.shards import JoinJob, SliceJob, read_summary, split_path


@dataclasses.dataclass
class _Unit:
    shard: Path | RemotePath
    slices: list[Path | RemotePath]
    missing: set[Path | RemotePath]


class Plan:
    """The slices and shards that are not finished, in order.

    `units` are the shards' paths, all in one folder, and their items. `done` maps the names of finished shards to
    their rejected files. `work` is the folder for slices.
    """

    def __init__(
        self,
        units: list[tuple[Path | RemotePath, Sequence]],
        work: Path | RemotePath,
        items_per_slice: int,
        done: dict[str, list[dict]],
    ):
        self.work, self._items_per_slice = work, items_per_slice
        missing_units = [(shard, items) for shard, items in units if shard.name not in done]
        self._done = [(len(items), done[shard.name]) for shard, items in units if shard.name in done]
        self.num_missing = sum(len(items) for _, items in missing_units)
        self._slices = self._missing_slices(missing_units)
        self._joins: deque[JoinJob] = deque()
        self._unfinished: dict[Path | RemotePath, _Unit] = {}  # slice -> its unit

    def earlier_results(self) -> Iterator[tuple[int, list[dict]]]:
        """Yield numbers of files that earlier runs finished, and the rejected ones among them."""
        yield from self._done
        for name in sizes(self.work):
            with contextlib.suppress(OSError, pa.ArrowException, KeyError):
                summary = read_summary(read_schema(self.work / name))
                yield summary["num_rows"] + len(summary["rejected"]), summary["rejected"]

    def next_job(self) -> SliceJob | JoinJob | None:
        """Return a job that can run now; None if all remaining jobs wait for others."""
        job = None if self._joins else next(self._slices, None)
        return self._joins.popleft() if self._joins and job is None else job

    def mark_done(self, job: SliceJob | JoinJob) -> None:
        if isinstance(job, SliceJob):
            unit = self._unfinished.pop(job.path)
            unit.missing.discard(job.path)
            if not unit.missing:
                self._joins.append(JoinJob(unit.shard, unit.slices))

    def _missing_slices(self, units: list[tuple[Path | RemotePath, Sequence]]) -> Iterator[SliceJob]:
        finished = {name for name in sizes(self.work) if _is_whole(self.work / name)}  # by a run that was killed
        for shard, items in units:
            starts = range(0, len(items), self._items_per_slice)
            slices = [self.work / f"{shard.stem}-{number:05d}.arrow" for number in range(len(starts))]
            unit = _Unit(shard, slices, {path for path in slices if path.name not in finished})
            if not unit.missing:
                self._joins.append(JoinJob(shard, slices))
            self._unfinished.update(dict.fromkeys(unit.missing, unit))
            for path, start in zip(slices, starts, strict=True):
                if path in unit.missing:
                    yield SliceJob(path, items[start : start + self._items_per_slice])


def done_units(shards: list[Path | RemotePath], splits: tuple[int, ...]) -> dict[str, list[dict]]:
    """Return the names of the shards that an earlier run completed in all splits, with their rejected files."""
    present = sizes(shards[0].parent) if shards else {}
    candidates = [shard for shard in shards if shard.name in present]
    found = zip(candidates, for_each(partial(_rejected_if_done, splits=splits), candidates), strict=True)
    return {shard.name: rejected for shard, rejected in found if rejected is not None and not is_transient(rejected)}


def is_transient(rejected: list[dict]) -> bool:
    return bool(faults.TRANSIENT & {line["fault"] for line in rejected})


def _rejected_if_done(shard: Path | RemotePath, splits: tuple[int, ...]) -> list[dict] | None:
    try:
        rejected = read_summary(read_schema(shard))["rejected"]
    except (OSError, pa.ArrowException, KeyError):
        return None
    if isinstance(shard, RemotePath):  # an object exists only when complete, and the training split is written last
        return rejected
    return rejected if all(_is_whole(split_path(shard, split)) for split in splits) else None


def _is_whole(path: Path | RemotePath) -> bool:
    """Return whether the file holds all its rows; a file that lost its end in a power failure does not."""
    try:
        with open_stream(path) as stream:
            return sum(batch.num_rows for batch in stream) == read_summary(stream.schema)["num_rows"]
    except (OSError, pa.ArrowException, KeyError):
        return False
