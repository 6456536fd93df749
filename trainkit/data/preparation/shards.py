"""The files of a prepared dataset: a slice of a work unit, and the shard that its slices are joined into.

Both are Arrow IPC streams, which `datasets.load_from_disk` memory-maps. The schema's metadata carries the features and
a summary: number of rows, class counts, rejected files. Its keys `facts` and `facts_digest` stand for image
statistics; they are kept so that the bytes of prepared shards stay the same.
"""

# H/W height and width, C channels, pixels in HWC order

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from trainkit.data import faults
from trainkit.data.account import Account, Kind
from trainkit.data.faults import RejectedImage
from trainkit.data.files import RemotePath, delete, exists, open_stream, written
from trainkit.data.format import CONDITION_COLUMN, NO_LABEL, SUMMARY_KEY, UNITS_FOLDER, VALIDATION_FOLDER
from trainkit.data.images.conditions import decode_pair
from trainkit.data.images.decode import decode_image
from trainkit.data.images.storage import image_columns, image_features, image_types
from trainkit.data.pairing import PairSettings
from trainkit.data.preparation.filtering import NO_FILTERS, TRAIN, VALIDATION, FilterSettings, is_held_out
from trainkit.data.preparation.image_stats import (
    STATS_SCHEMA,
    ImageStats,
    image_stats,
    stats_batch,
    stats_digest,
    sum_stats,
)
from trainkit.data.preparation.rows import Rows, rebatch
from trainkit.data.settings import PreparationSettings
from trainkit.data.sources.records import Record
from trainkit.data.sources.source import Reader
from trainkit.data.sources.vectors import check_vector
from trainkit.errors import UserError

SLICE_ITEMS = 128  # images that one job decodes
BATCH_BYTES = 64 * 2**20  # of pixels per record batch, far below the limit of int32 offsets


class SliceJob(NamedTuple):
    """Decode `items` into `path`. `crashing`: positions of items that are known to kill the process."""

    path: Path | RemotePath
    items: Sequence
    crashing: tuple[int, ...] = ()


class JoinJob(NamedTuple):
    """Join the slices of a unit, in order, into its shard, and delete them."""

    path: Path | RemotePath
    slices: list[Path | RemotePath]


@dataclass(frozen=True)
class ShardWriter:
    """Turns a job into its file, in the same way in every process."""

    reader: Reader
    settings: PreparationSettings
    label_names: list[str] | None
    has_text: bool
    vector_length: int | None = None
    filters: FilterSettings = NO_FILTERS
    pairs: PairSettings | None = None

    def run(self, job: SliceJob | JoinJob) -> None:
        """Write the file of a job."""
        if isinstance(job, JoinJob):
            self.join(job)
        else:
            self.write_slice(job)

    def probe(self, items: Sequence) -> None:
        """Decode the items and discard the result, to find out whether they kill the process."""
        for _ in self._decoded(SliceJob(Path(), items), [], Account()):
            pass

    def write_slice(self, job: SliceJob) -> None:
        """Decode the items of a job and write those that can be used."""
        rejected: list[dict] = []
        stats: list[ImageStats] = []
        account = Account()
        batches, rows, size = [], [], 0
        for row in self._decoded(job, rejected, account):
            stats.append(image_stats(row["image"], self.filters))
            rows.append(row)
            size += row["image"].nbytes + (0 if self.pairs is None else row[CONDITION_COLUMN].nbytes)
            if size >= BATCH_BYTES:
                batches.append(self._batch(rows))
                rows, size = [], 0
        if rows:
            batches.append(self._batch(rows))
        summary = {"num_rows": len(stats), "rejected": rejected, "facts": stats} | _account_part(account)
        write_stream(job.path, self.schema, batches, summary)

    def join(self, job: JoinJob) -> None:
        """Write the shards of a unit, one per split, and with deduplication the statistics of its images."""
        try:
            streams = [open_stream(path) for path in job.slices]
        except FileNotFoundError:
            if exists(job.path):  # another run at the same URL was first: its shard has the same bytes
                return
            raise
        summaries = [read_summary(stream.schema) for stream in streams]
        stats = [ImageStats(*values) for summary in summaries for values in summary["facts"]]
        account = Account()
        for summary in summaries:
            account.merge(Account.from_json(summary.get("account", {})))
        rejected = [line for summary in summaries for line in summary["rejected"]]
        unit = {"rejected": rejected} | _account_part(account)
        rows = Rows([batch for stream in streams for batch in stream])
        fraction = self.filters.validation_fraction
        held_out = [bool(fraction) and is_held_out(image.content_hash, fraction) for image in stats]
        splits = np.where(held_out, VALIDATION, TRAIN)
        dedup = self._write_stats(job, rows, splits, stats) if self.filters.deduplicate != "none" else {}
        for split in reversed(self.filters.splits):  # training last: where its shard exists, all do
            picked = np.flatnonzero(splits == split)
            about = (unit if split == TRAIN else {"rejected": []}) | dedup
            self.write_rows(split_path(job.path, split), rows, picked, [stats[row] for row in picked], about)
        for path in job.slices:
            delete(path)

    def _write_stats(self, job: JoinJob, rows: Rows, splits: np.ndarray, stats: list[ImageStats]) -> dict:
        """Write what deduplication needs of the unit; returns what its shards say about that."""
        labels = rows.column("label") if self.label_names is not None else [None] * len(rows)
        batch = stats_batch(splits.tolist(), stats, labels, rows.column("source"))
        digest = stats_digest(batch)
        write_stream(stats_path(job.path), STATS_SCHEMA, [batch], {"facts_digest": digest})
        return {"facts_digest": digest, "positions": None}

    def write_rows(
        self, path: Path | RemotePath, rows: Rows, picked: np.ndarray, stats: list[ImageStats], about: dict
    ) -> None:
        """Write the `picked` rows, whose statistics are `stats`, as a shard; `about` goes into its summary as well."""
        batches = rebatch(rows.take(picked), BATCH_BYTES)
        labels = rows.column("label") if self.label_names is not None else None
        classes = Counter(labels[row] for row in picked) if labels is not None else {}
        summary = {
            "num_rows": len(picked),
            "classes": {str(label): classes[label] for label in sorted(classes)},
            "pixels": sum_stats(stats),
        }
        write_stream(path, self.schema, batches, summary | about)

    def _decoded(self, job: SliceJob, rejected: list[dict], account: Account) -> Iterator[dict]:
        for position, item in enumerate(job.items):
            name = self.reader.name(item)
            try:
                if position in job.crashing:
                    raise RejectedImage(
                        faults.CRASHED, "decoding it killed the process (a crash, or too little memory)"
                    )
                record = self.reader.read(item)
                if record.image is None:
                    raise RejectedImage(faults.MISSING, "the row holds no image")
                vector = None if self.vector_length is None else check_vector(record.vector, self.vector_length)
                image, condition = self._images(record)
            except RejectedImage as rejection:
                if rejection.fault in faults.OF_THE_SETTINGS:
                    assert self.pairs is not None  # whose fault it is
                    flag = f"--conditioning_classes {self.pairs.classes}"
                    raise UserError(f"{flag}: {_valid_text(name)}: {rejection}; correct it, or the flag") from None
                rejected.append({"source": name, "fault": rejection.fault, "message": str(rejection)})
                continue
            for kind in record.notes:
                account.add(kind, _valid_text(name))
            if self.label_names is not None and record.label == NO_LABEL:
                account.add(Kind.NO_CLASS, _valid_text(name))
            known = {"label": record.label, "text": record.text, "vector": vector}
            yield {"image": image, CONDITION_COLUMN: condition, "source": _valid_text(name), **known}

    def _images(self, record: Record) -> tuple[np.ndarray, np.ndarray | None]:
        """The decoded image of a record, and its conditioning image. Raises `RejectedImage`."""
        assert record.image is not None  # checked before
        if self.pairs is None:
            return decode_image(record.image, self.settings), None
        return decode_pair(record.image, record.condition, self.settings, self.pairs)

    @property
    def features(self) -> dict[str, dict]:
        """The columns in the form in which `datasets` writes features; importing `datasets` takes a second."""
        features = image_features(self.settings)
        if self.pairs is not None:
            features[CONDITION_COLUMN] = image_features(self.pairs.image_settings(self.settings))["image"]
        if self.label_names is not None:
            features["label"] = {"names": self.label_names, "_type": "ClassLabel"}
        if self.has_text:
            features["text"] = {"dtype": "string", "_type": "Value"}
        if self.vector_length is not None:
            number = {"dtype": "float32", "_type": "Value"}
            features["vector"] = {"feature": number, "length": self.vector_length, "_type": "List"}
        return features | {"source": {"dtype": "string", "_type": "Value"}}

    @property
    def schema(self) -> pa.Schema:
        types = {**image_types(self.settings), "label": pa.int64()}
        if self.pairs is not None:
            types[CONDITION_COLUMN] = image_types(self.pairs.image_settings(self.settings))["image"]
        types["vector"] = pa.list_(pa.float32(), self.vector_length or 0)
        metadata = {"huggingface": json.dumps({"info": {"features": self.features}})}
        return pa.schema([(name, types.get(name, pa.string())) for name in self.features], metadata)

    def _batch(self, rows: list[dict]) -> pa.RecordBatch:
        columns = image_columns([row["image"] for row in rows], self.settings)
        if self.pairs is not None:
            conditions = [row[CONDITION_COLUMN] for row in rows]
            columns[CONDITION_COLUMN] = image_columns(conditions, self.pairs.image_settings(self.settings))["image"]
        columns["source"] = pa.array([row["source"] for row in rows], pa.string())
        if self.label_names is not None:
            columns["label"] = pa.array([row["label"] for row in rows], pa.int64())
        if self.has_text:
            columns["text"] = pa.array([row["text"] for row in rows], pa.string())
        if self.vector_length is not None:
            numbers = pa.array(np.concatenate([row["vector"] for row in rows]), pa.float32())
            columns["vector"] = pa.FixedSizeListArray.from_arrays(numbers, self.vector_length)
        return pa.record_batch([columns[name] for name in self.schema.names], schema=self.schema)


def split_path(shard: Path | RemotePath, split: int) -> Path | RemotePath:
    """Return the path of the shard with the rows of one split of a unit."""
    return shard if split == TRAIN else shard.parent / VALIDATION_FOLDER / shard.name


def stats_path(shard: Path | RemotePath) -> Path | RemotePath:
    """Return the path of the statistics of a unit's images."""
    return shard.parent / UNITS_FOLDER / shard.name


def read_summary(schema: pa.Schema) -> dict:
    """Read a shard's summary: `num_rows`, `classes` (label -> count), `pixels` (sums), and `rejected` of its unit.

    A slice has `facts`, the `ImageStats` of its images, instead of the sums.
    """
    return json.loads((schema.metadata or {})[SUMMARY_KEY])


def read_shard(path: Path | RemotePath) -> tuple[dict, list[pa.RecordBatch]] | None:
    """Read the summary and rows of a shard; None if it is missing or not whole."""
    try:
        with open_stream(path) as stream:
            summary, batches = read_summary(stream.schema), list(stream)  # one that was cut short raises
    except (OSError, pa.ArrowException, KeyError):
        return None
    return (summary, batches) if sum(batch.num_rows for batch in batches) == summary["num_rows"] else None


def write_stream(path: Path | RemotePath, schema: pa.Schema, batches: Iterable[pa.RecordBatch], summary: dict) -> None:
    """Write an Arrow stream whose schema carries `summary`; it appears once it is complete."""
    schema = schema.with_metadata({**(schema.metadata or {}), SUMMARY_KEY: json.dumps(summary)})
    with written(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        with pa.ipc.new_stream(file, schema) as stream:
            for batch in batches:
                stream.write_batch(batch)


def _account_part(account: Account) -> dict:
    """The part of a summary for an account; nothing for an empty one."""
    return {"account": account.to_json()} if account.counts else {}


def _valid_text(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
