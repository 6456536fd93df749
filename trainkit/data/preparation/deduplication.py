"""Deduplication of units that are done: what is dropped leaves the shards, and is kept aside.

A unit's rows on one side of the split are one shard or, where some are dropped, two: one of the rows that stay, and a
hidden one of those that do not. So no image is stored twice, and one that is dropped no longer comes back without
being decoded. Names tell what is inside: a decision that stays costs nothing the next time.
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
    exact_duplicates,
    near_duplicates,
)
from trainkit.data.preparation.image_stats import ImageStats
from trainkit.data.preparation.plan import is_transient
from trainkit.data.preparation.rows import Rows
from trainkit.data.preparation.shards import ShardWriter, read_shard, read_summary, split_path, stats_path

OPEN_UNITS = 256  # whose facts stay open while duplicates are told


class Part(NamedTuple):
    """Rows of one side of a unit: all, those that stay, or those that are dropped (`hidden`)."""

    path: Path | RemotePath
    hidden: Path | RemotePath | None


class Facts(NamedTuple):
    digest: str
    table: pa.RecordBatch


class Pieces:
    """The shards of an output folder by unit, from one listing of it."""

    def __init__(self, output_dir: Path | RemotePath):
        self._marks = defaultdict(set)  # side, data-<unit> -> marks of the pairs that may be there
        for side, folder in ((TRAIN, output_dir), (VALIDATION, output_dir / VALIDATION_FOLDER)):
            for name in sizes(folder):
                stem, _, mark = name.removesuffix(".arrow").rpartition("-")
                self._marks[side, stem].add(mark)

    def is_whole(self, shard: Path | RemotePath, sides: tuple[int, ...]) -> bool:
        """Whether every row of the unit is somewhere."""
        facts = read_stats(shard)
        return facts is not None and all(self.rows(shard, side, facts.digest) is not None for side in sides)

    def parts(self, shard: Path | RemotePath, side: int) -> list[Part]:
        """What may hold a side of the unit: all of it in one shard, or pairs."""
        marks = sorted(self._marks[side, shard.stem])
        return [Part(split_path(shard, side), None), *(pair_of(shard, side, mark) for mark in marks)]

    def summary(self, shard: Path | RemotePath) -> dict:
        """What a complete unit says about itself: its rejected files, its account."""
        digest = read_stats(shard).digest
        found = (_read(part.path, digest) for part in self.parts(shard, TRAIN))
        return next(read[0] for read in found if read)

    def rows(self, shard: Path | RemotePath, side: int, digest: str) -> Rows | None:
        """All rows on one side of a unit, in the source's order, from what holds them; None where some are lost."""
        for part in self.parts(shard, side):
            read = [_read(path, digest) for path in part if path is not None]
            if all(read):
                positions = [summary["positions"] for summary, _ in read]
                batches = [batch for _, batches in read for batch in batches]
                return Rows(batches, None if part.hidden is None else np.concatenate(positions))
        return None


def done_units(
    output_dir: Path | RemotePath, shards: list[Path | RemotePath], filters: FilterSettings
) -> dict[str, list[dict]]:
    """The names of units whose images a former run left, whole, with their rejected files."""
    pieces, done = Pieces(output_dir), {}
    for shard in shards:
        rejected = pieces.summary(shard)["rejected"] if pieces.is_whole(shard, filters.sides) else None
        if rejected is not None and not is_transient(rejected):
            done[shard.name] = rejected
    return done


def pair_of(shard: Path | RemotePath, side: int, mark: str) -> Part:
    whole = split_path(shard, side)
    hidden = shard.parent / UNITS_FOLDER / f"{shard.stem}-{side}-{mark}.arrow"
    return Part(whole.parent / f"{whole.stem}-{mark}.arrow", hidden)


def _read(path: Path | RemotePath, digest: str) -> tuple[dict, list[pa.RecordBatch]] | None:
    """Summary and rows of a shard, where it is whole and of this version of its unit."""
    read = read_shard(path)
    return read if read and read[0].get("facts_digest") == digest else None


def read_stats(shard: Path | RemotePath) -> Facts | None:
    """What is kept of a unit's images besides their pixels; None where there is nothing whole."""
    try:
        with open_stream(stats_path(shard)) as stream:
            digest, batches = read_summary(stream.schema)["facts_digest"], list(stream)
    except (OSError, pa.ArrowException, KeyError):
        return None
    return Facts(digest, batches[0]) if batches else None


def drop_duplicates(
    writer: ShardWriter, output_dir: Path | RemotePath, shards: list[Path | RemotePath], sweep_at_once: bool
) -> tuple[dict[int, list[Part]], dict[Path | RemotePath, list[dict]]]:
    """Take what repeats an earlier image out of the shards of finished units.

    Returns for each side of the split its parts in the source's order, and for each unit the lines that tell what
    was dropped. `sweep_at_once` deletes what a new part replaces: where no finished dataset needs it.
    """
    repeated = _repeated(writer, shards)
    pieces, parts, told = Pieces(output_dir), {side: [] for side in writer.filters.sides}, {}
    starts = np.cumsum([0] + [read_stats(shard).table.num_rows for shard in shards])
    for shard, start, end in zip(shards, starts[:-1], starts[1:], strict=True):
        facts = read_stats(shard)
        dropped = repeated[start:end] != KEPT
        rows_by_side = facts.table.column("side").to_numpy()
        for side in writer.filters.sides:
            of_side = np.flatnonzero(rows_by_side == side)
            parts[side].append(_divided(writer, pieces, shard, side, facts, of_side, dropped, sweep_at_once))
    lines = _told(writer, shards, starts, repeated)
    for unit, line in lines:
        told.setdefault(shards[unit], []).append(line)
    return parts, told


def _repeated(writer: ShardWriter, shards: list[Path | RemotePath]) -> np.ndarray:
    """For each image (N,) the one that it repeats, or `KEPT`. In memory: at most 90 bytes an image."""
    is_near = writer.filters.deduplicate == "near"
    column, width = ("perceptual_hash", 1) if is_near else ("content_hash", 2)
    parts = [np.empty(0, dtype=np.uint64)]
    for shard in shards:
        values = read_stats(shard).table.column(column)
        parts.append(np.frombuffer(values.buffers()[1], dtype=np.uint64, count=width * len(values)))
    hashes = np.concatenate(parts)
    if is_near:
        return near_duplicates(hashes, writer.filters.near_distance)
    return exact_duplicates(hashes.reshape(-1, 2))


def _divided(
    writer: ShardWriter,
    pieces: Pieces,
    shard: Path | RemotePath,
    side: int,
    facts: Facts,
    of_side: np.ndarray,
    dropped: np.ndarray,
    sweep_at_once: bool,
) -> Part:
    """The part of one side of a unit that holds what is not `dropped`; made, unless it is there."""
    whole, is_dropped = split_path(shard, side), dropped[of_side]
    leaving = np.flatnonzero(is_dropped).tolist()
    mark = hashlib.blake2b(repr((facts.digest, leaving)).encode(), digest_size=8).hexdigest()
    part = pair_of(shard, side, mark) if leaving else Part(whole, None)
    if all(_read(path, facts.digest) for path in part if path is not None):
        return part
    rows = pieces.rows(shard, side, facts.digest)
    about = [_as_facts(row) for row in facts.table.take(pa.array(of_side)).to_pylist()]
    summary = pieces.summary(shard) if side == TRAIN else {}
    rejected = summary.get("rejected", [])
    notes = {"account": summary["account"]} if "account" in summary else {}
    for path, picked in zip(part, (np.flatnonzero(~is_dropped), np.flatnonzero(is_dropped)), strict=True):
        if path is not None:
            positions = picked.tolist() if leaving else None
            writer.write_rows(
                path, rows, picked, [about[row] for row in picked], rejected, facts.digest, positions, notes
            )
    if leaving and sweep_at_once:
        delete(whole)
    return part


def _as_facts(row: dict) -> ImageStats:
    return ImageStats(row["content_hash"].hex(), *(row[name] for name in ImageStats._fields[1:]))


def _told(
    writer: ShardWriter, shards: list[Path | RemotePath], starts: np.ndarray, repeated: np.ndarray
) -> Iterator[tuple[int, dict]]:
    """(number of the unit, line of rejected.jsonl) for each dropped image."""

    @functools.lru_cache(maxsize=OPEN_UNITS)
    def table(unit: int) -> pa.RecordBatch:
        return read_stats(shards[unit]).table

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
            message += f", which is of another class: {_class_name(writer, first['label'])}"
        yield unit, {
            "source": row["source"], "fault": faults.DUPLICATE, "message": message, "repeats": first["source"]
        }  # fmt: skip


def _class_name(writer: ShardWriter, label: int) -> str:
    return writer.label_names[label] if label >= 0 else "none"
