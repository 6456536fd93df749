"""The files of a prepared dataset: a slice of a work unit, and the shard that its slices are joined into.

Both are Arrow IPC streams, as `datasets.load_from_disk` memory-maps them, which appear under their names when whole.
Beside the features, the schema's metadata carries what the unit says of itself: rows, class counts, rejected files.
"""

# H/W height and width, C channels, pixels in HWC order

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from trainkit.data import faults
from trainkit.data.account import Account
from trainkit.data.faults import RejectedImage
from trainkit.data.files import RemotePath, delete, exists, open_stream, written
from trainkit.data.format import UNITS_FOLDER, VALIDATION_FOLDER
from trainkit.data.images.decode import decode_image
from trainkit.data.images.storage import image_columns, image_features, image_types
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
from trainkit.data.sources.vectors import check_vector

SLICE_ITEMS = 128  # images decoded at one go by one process
BATCH_BYTES = 64 * 2**20  # of pixels in a record batch: far from what int32 offsets can hold
SUMMARY_KEY = b"preparation"


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
    """All that turns a job into its file, the same in every process."""

    reader: Any
    settings: PreparationSettings
    label_names: list[str] | None
    has_text: bool
    vector_length: int | None = None
    filters: FilterSettings = NO_FILTERS

    def run(self, job: SliceJob | JoinJob) -> None:
        if isinstance(job, JoinJob):
            self.join(job)
        else:
            self.write_slice(job)

    def probe(self, items: Sequence) -> None:
        """Decode and forget: tells whether the items kill a process."""
        for _ in self._decoded(SliceJob(Path(), items), [], Account()):
            pass

    def write_slice(self, job: SliceJob) -> None:
        rejected: list[dict] = []
        facts: list[ImageStats] = []
        account = Account()
        batches, rows, size = [], [], 0
        for row in self._decoded(job, rejected, account):
            facts.append(image_stats(row["image"], self.filters))
            rows.append(row)
            size += row["image"].nbytes
            if size >= BATCH_BYTES:
                batches.append(self._batch(rows))
                rows, size = [], 0
        if rows:
            batches.append(self._batch(rows))
        summary = {"num_rows": len(facts), "rejected": rejected, "facts": facts} | _of_account(account)
        write_stream(job.path, self.schema, batches, summary)

    def join(self, job: JoinJob) -> None:
        try:
            streams = [open_stream(path) for path in job.slices]
        except FileNotFoundError:
            if exists(job.path):  # another run at the same URL was first: its shard has the same bytes
                return
            raise
        summaries = [read_summary(stream.schema) for stream in streams]
        rejected = [line for summary in summaries for line in summary["rejected"]]
        facts = [ImageStats(*fact) for summary in summaries for fact in summary["facts"]]
        account = Account()
        for summary in summaries:
            account.merge(Account.from_json(summary.get("account", {})))
        rows = Rows([batch for stream in streams for batch in stream])
        fraction = self.filters.validation_fraction
        held_out = [bool(fraction) and is_held_out(fact.content_hash, fraction) for fact in facts]
        sides = np.where(held_out, VALIDATION, TRAIN)
        digest = None
        if self.filters.deduplicate != "none":
            labels = rows.column("label") if self.label_names is not None else [None] * len(rows)
            about = stats_batch(sides.tolist(), facts, labels, rows.column("source"))
            digest = stats_digest(about)
            write_stream(stats_path(job.path), STATS_SCHEMA, [about], {"facts_digest": digest})
        for side in reversed(self.filters.sides):  # training's last: where it is, all are
            picked = np.flatnonzero(sides == side)
            told, about = rejected if side == TRAIN else [], [facts[row] for row in picked]
            notes = _of_account(account) if side == TRAIN else {}
            self.write_rows(split_path(job.path, side), rows, picked, about, told, digest, notes=notes)
        for path in job.slices:
            delete(path)

    def write_rows(
        self,
        path: Path | RemotePath,
        rows: Rows,
        picked: np.ndarray,
        facts: list[ImageStats],
        rejected: list[dict],
        digest: str | None = None,
        positions: list[int] | None = None,
        notes: dict | None = None,
    ) -> None:
        """Write the `picked` rows, whose facts these are, as a shard; the rest is told of it in its summary."""
        batches = rebatch(rows.take(picked), BATCH_BYTES)
        labels = rows.column("label") if self.label_names is not None else None
        classes = Counter(labels[row] for row in picked) if labels is not None else {}
        summary = {
            "num_rows": len(picked),
            "classes": {str(label): classes[label] for label in sorted(classes)},
            "pixels": sum_stats(facts),
            "rejected": rejected,
            **(notes or {}),
        }
        if digest is not None:
            summary |= {"facts_digest": digest, "positions": positions}
        write_stream(path, self.schema, batches, summary)

    def _decoded(self, job: SliceJob, rejected: list[dict], account: Account) -> Iterator[dict]:
        for position, item in enumerate(job.items):
            name = self.reader.name(item)
            try:
                if position in job.crashing:
                    raise RejectedImage(
                        faults.CRASHED, "decoding it killed the process, by a fault or for want of memory"
                    )
                record = self.reader.read(item)
                if record.image is None:
                    raise RejectedImage(faults.MISSING, "the row holds no image")
                vector = None if self.vector_length is None else check_vector(record.vector, self.vector_length)
                image = decode_image(record.image, self.settings)
            except RejectedImage as rejection:
                rejected.append({"source": name, "fault": rejection.fault, "message": str(rejection)})
                continue
            for kind in record.notes:
                account.add(kind, _valid_text(name))
            known = {"label": record.label, "text": record.text, "vector": vector}
            yield {"image": image, "source": _valid_text(name), **known}

    @property
    def features(self) -> dict[str, dict]:
        """The columns as `datasets` writes features; spelled out here, since importing it takes a second."""
        features = image_features(self.settings)
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
        types["vector"] = pa.list_(pa.float32(), self.vector_length or 0)
        metadata = {"huggingface": json.dumps({"info": {"features": self.features}})}
        return pa.schema([(name, types.get(name, pa.string())) for name in self.features], metadata)

    def _batch(self, rows: list[dict]) -> pa.RecordBatch:
        columns = image_columns([row["image"] for row in rows], self.settings)
        columns["source"] = pa.array([row["source"] for row in rows], pa.string())
        if self.label_names is not None:
            columns["label"] = pa.array([row["label"] for row in rows], pa.int64())
        if self.has_text:
            columns["text"] = pa.array([row["text"] for row in rows], pa.string())
        if self.vector_length is not None:
            numbers = pa.array(np.concatenate([row["vector"] for row in rows]), pa.float32())
            columns["vector"] = pa.FixedSizeListArray.from_arrays(numbers, self.vector_length)
        return pa.record_batch([columns[name] for name in self.schema.names], schema=self.schema)


def split_path(shard: Path | RemotePath, side: int) -> Path | RemotePath:
    """Where the rows of a unit go that are on this side of the split."""
    return shard if side == TRAIN else shard.parent / VALIDATION_FOLDER / shard.name


def stats_path(shard: Path | RemotePath) -> Path | RemotePath:
    return shard.parent / UNITS_FOLDER / shard.name


def read_summary(schema: pa.Schema) -> dict:
    """What a shard says of itself: num_rows, classes (label -> count), pixels (their sums), and of its unit: rejected.

    A slice has `facts` instead of what is counted from them.
    """
    return json.loads((schema.metadata or {})[SUMMARY_KEY])


def read_shard(path: Path | RemotePath) -> tuple[dict, list[pa.RecordBatch]] | None:
    """Summary and rows of a shard; None where it is missing, or not whole."""
    try:
        with open_stream(path) as stream:
            summary, batches = read_summary(stream.schema), list(stream)  # one that was cut short raises
    except (OSError, pa.ArrowException, KeyError):
        return None
    return (summary, batches) if sum(batch.num_rows for batch in batches) == summary["num_rows"] else None


def write_stream(path: Path | RemotePath, schema: pa.Schema, batches: Iterator[pa.RecordBatch], summary: dict) -> None:
    schema = schema.with_metadata({**(schema.metadata or {}), SUMMARY_KEY: json.dumps(summary)})
    with written(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        with pa.ipc.new_stream(file, schema) as stream:
            for batch in batches:
                stream.write_batch(batch)


def _of_account(account: Account) -> dict:
    """The part of a summary for an account; nothing for an empty one."""
    return {"account": account.to_json()} if account.counts else {}


def _valid_text(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
