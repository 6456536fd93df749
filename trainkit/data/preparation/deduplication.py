"""Deduplication of finished units: duplicates leave the shards and are kept separately.

The rows of one split of a unit are stored in one shard or, if some of them are duplicates, in two: one with the rows
that are kept and one, in `.units`, with those that are dropped. So no image is stored twice, and an image that is no
longer a duplicate returns without being decoded. The names contain a hash of the decision:
if it does not change, the next run writes nothing.
"""

# N images in the source's order, over all units

import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from trainkit.data import faults
from trainkit.data.files import RemotePath, delete, open_stream, sizes
from trainkit.data.format import UNITS_FOLDER, VALIDATION_FOLDER
from trainkit.data.preparation.filtering import (
    HASH_BITS,
    KEPT,
    TRAIN,
    VALIDATION,
    FilterSettings,
    duplicates_by_look,
    exact_duplicates,
)
from trainkit.data.preparation.image_stats import ImageStats
from trainkit.data.preparation.plan import is_transient
from trainkit.data.preparation.rows import Rows
from trainkit.data.preparation.shards import ShardWriter, read_shard, read_summary, split_path, stats_path

OPEN_UNITS = 256  # units whose statistics stay open while the lines about duplicates are written


class Part(NamedTuple):
    """Rows of one split of a unit: the shard of those that are kept (`path`) and of those that are `dropped`."""

    path: Path | RemotePath
    dropped: Path | RemotePath | None


class UnitStats(NamedTuple):
    digest: str
    table: pa.RecordBatch


class UnitFiles:
    """The shards in an output folder by unit, from one listing of it."""

    def __init__(self, output_dir: Path | RemotePath):
        self._marks = defaultdict(set)  # split, data-<unit> -> marks of the pairs that may exist
        for split, folder in ((TRAIN, output_dir), (VALIDATION, output_dir / VALIDATION_FOLDER)):
            for name in sizes(folder):
                stem, _, mark = name.removesuffix(".arrow").rpartition("-")
                self._marks[split, stem].add(mark)

    def is_whole(self, shard: Path | RemotePath, splits: tuple[int, ...]) -> bool:
        """Return whether every row of the unit exists in some file."""
        stats = read_stats(shard)
        return stats is not None and all(self.rows(shard, split, stats.digest) is not None for split in splits)

    def parts(self, shard: Path | RemotePath, split: int) -> list[Part]:
        """Return the files that may hold one split of the unit: one shard with all rows, or pairs."""
        marks = sorted(self._marks[split, shard.stem])
        return [Part(split_path(shard, split), None), *(pair_of(shard, split, mark) for mark in marks)]

    def summary(self, shard: Path | RemotePath) -> dict:
        """Return the summary of a complete unit: its rejected files, its account."""
        digest = _stats_of(shard).digest
        found = (_read(part.path, digest) for part in self.parts(shard, TRAIN))
        return next(read[0] for read in found if read)

    def rows(self, shard: Path | RemotePath, split: int, digest: str) -> Rows | None:
        """Return all rows of one split of a unit in the source's order; None if some are lost."""
        for part in self.parts(shard, split):
            read = [_read(path, digest) for path in part if path is not None]
            whole = [one for one in read if one]
            if len(whole) == len(read):
                positions = [summary["positions"] for summary, _ in whole]
                batches = [batch for _, batches in whole for batch in batches]
                return Rows(batches, None if part.dropped is None else np.concatenate(positions))
        return None


def done_units(
    output_dir: Path | RemotePath, shards: list[Path | RemotePath], filters: FilterSettings
) -> dict[str, list[dict]]:
    """Return the names of the units that an earlier run completed, with their rejected files."""
    files, done = UnitFiles(output_dir), {}
    for shard in shards:
        rejected = files.summary(shard)["rejected"] if files.is_whole(shard, filters.splits) else None
        if rejected is not None and not is_transient(rejected):
            done[shard.name] = rejected
    return done


def pair_of(shard: Path | RemotePath, split: int, mark: str) -> Part:
    """Return the paths of the two shards of one split of a unit for the decision named `mark`."""
    whole = split_path(shard, split)
    dropped = shard.parent / UNITS_FOLDER / f"{shard.stem}-{split}-{mark}.arrow"
    return Part(whole.parent / f"{whole.stem}-{mark}.arrow", dropped)


def _read(path: Path | RemotePath, digest: str) -> tuple[dict, list[pa.RecordBatch]] | None:
    """Return the summary and rows of a shard if it is complete and of this version of its unit."""
    read = read_shard(path)
    return read if read and read[0].get("facts_digest") == digest else None


def read_stats(shard: Path | RemotePath) -> UnitStats | None:
    """Return the statistics of a unit's images; None if there is no complete file."""
    try:
        with open_stream(stats_path(shard)) as stream:
            digest, batches = read_summary(stream.schema)["facts_digest"], list(stream)
    except (OSError, pa.ArrowException, KeyError):
        return None
    return UnitStats(digest, batches[0]) if batches else None


def _stats_of(shard: Path | RemotePath) -> UnitStats:
    """The statistics of a unit that is complete."""
    stats = read_stats(shard)
    assert stats is not None
    return stats


def drop_duplicates(
    writer: ShardWriter, output_dir: Path | RemotePath, shards: list[Path | RemotePath], sweep_at_once: bool
) -> tuple[dict[int, list[Part]], dict[Path | RemotePath, list[dict]]]:
    """Remove images that repeat an earlier image from the shards of finished units.

    Returns the parts of each split in the source's order, and for each unit the lines of rejected.jsonl about what was
    dropped. `sweep_at_once` deletes the shard that a new part replaces: for a folder without a finished dataset.
    """
    repeated = _repeated(writer, shards)
    files = UnitFiles(output_dir)
    parts: dict[int, list[Part]] = {split: [] for split in writer.filters.splits}
    starts = np.cumsum([0] + [_stats_of(shard).table.num_rows for shard in shards])
    for shard, start, end in zip(shards, starts[:-1], starts[1:], strict=True):
        is_dropped = repeated[start:end] != KEPT
        for split in writer.filters.splits:
            part, is_new = _split_part(writer, files, shard, split, is_dropped)
            if is_new and part.dropped is not None and sweep_at_once:
                delete(split_path(shard, split))
            parts[split].append(part)
    lines: dict[Path | RemotePath, list[dict]] = {}
    for unit, line in _duplicate_lines(writer, shards, starts, repeated):
        lines.setdefault(shards[unit], []).append(line)
    return parts, lines


def _repeated(writer: ShardWriter, shards: list[Path | RemotePath]) -> np.ndarray:
    """Return for each image (N,) the one that it repeats, or `KEPT`. Uses at most 100 bytes of memory per image."""
    is_near = writer.filters.deduplicate == "near"
    content, perceptual = [np.empty((0, 2), dtype=np.uint64)], [np.empty(0, dtype=np.uint64)]
    for shard in shards:
        table = _stats_of(shard).table
        content.append(_hashes(table.column("content_hash"), 2).reshape(-1, 2))
        if is_near:
            perceptual.append(_hashes(table.column("perceptual_hash"), 1))
    content_hashes = np.concatenate(content)
    if not is_near:
        return exact_duplicates(content_hashes)
    hashes = np.concatenate(perceptual)
    return duplicates_by_look(hashes, content_hashes, writer.filters.near_distance)


def _hashes(column: pa.Array, words: int) -> np.ndarray:
    """Return the column's values as uint64, `words` per value."""
    return np.frombuffer(column.buffers()[1], dtype=np.uint64, count=words * len(column))


def _split_part(
    writer: ShardWriter, files: UnitFiles, shard: Path | RemotePath, split: int, is_dropped: np.ndarray
) -> tuple[Part, bool]:
    """Return the part of one split of a unit without the dropped images, and whether it had to be written."""
    stats = _stats_of(shard)
    of_split = np.flatnonzero(stats.table.column("side").to_numpy() == split)
    is_dropped = is_dropped[of_split]
    leaving = np.flatnonzero(is_dropped).tolist()
    mark = hashlib.blake2b(repr((stats.digest, leaving)).encode(), digest_size=8).hexdigest()
    part = pair_of(shard, split, mark) if leaving else Part(split_path(shard, split), None)
    if all(_read(path, stats.digest) for path in part if path is not None):
        return part, False
    rows = files.rows(shard, split, stats.digest)
    assert rows is not None  # as the unit is complete
    image_stats = [_as_stats(row) for row in stats.table.take(pa.array(of_split)).to_pylist()]
    unit = files.summary(shard) if split == TRAIN else {"rejected": []}
    for path, picked in zip(part, (np.flatnonzero(~is_dropped), np.flatnonzero(is_dropped)), strict=True):
        if path is not None:
            summary = {name: unit[name] for name in ("rejected", "account") if name in unit}
            summary |= {"facts_digest": stats.digest, "positions": picked.tolist() if leaving else None}
            writer.write_rows(path, rows, picked, [image_stats[row] for row in picked], summary)
    return part, True


def _as_stats(row: dict) -> ImageStats:
    return ImageStats(row["content_hash"].hex(), *(row[name] for name in ImageStats._fields[1:]))


def _duplicate_lines(
    writer: ShardWriter, shards: list[Path | RemotePath], starts: np.ndarray, repeated: np.ndarray
) -> Iterator[tuple[int, dict]]:
    """Yield (number of the unit, line of rejected.jsonl) for each dropped image."""

    @functools.lru_cache(maxsize=OPEN_UNITS)
    def table(unit: int) -> pa.RecordBatch:
        return _stats_of(shards[unit]).table

    def row_of(image: int) -> tuple[int, dict]:
        unit = int(np.searchsorted(starts, image, side="right")) - 1
        return unit, table(unit).slice(image - starts[unit], 1).to_pylist()[0]

    for image in np.flatnonzero(repeated != KEPT).tolist():
        (unit, row), (_, first) = row_of(image), row_of(int(repeated[image]))
        if row["content_hash"] == first["content_hash"]:
            message = f"the same pixels as {first['source']}"
        else:
            distance = (row["perceptual_hash"] ^ first["perceptual_hash"]).bit_count()
            message = f"looks like {first['source']}: {distance} of {HASH_BITS} bits differ"
        if row["label"] != first["label"]:
            message += f", which has another class: {_class_name(writer, first['label'])}"
        yield unit, {
            "source": row["source"], "fault": faults.DUPLICATE, "message": message, "repeats": first["source"]
        }  # fmt: skip


def _class_name(writer: ShardWriter, label: int) -> str:
    return "none" if label < 0 or writer.label_names is None else writer.label_names[label]
