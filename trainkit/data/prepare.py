"""Images -> a prepared dataset: a folder of Arrow shards that opens by memory map, with no decoding left to do.

The source is cut into work units of about 2,000 images, each a pure function from its files and the settings to one
shard named by a hash of both. So the result does not depend on the number of processes, a killed run goes on where it
stopped, and files that were added or changed cost only their own units.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import platform
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from trainkit.data.pool import num_cores, run_jobs
from trainkit.data.settings import PreparationSettings
from trainkit.data.shards import (
    BATCH_BYTES,
    SLICE_ITEMS,
    JoinJob,
    ShardWriter,
    SliceJob,
    open_stream,
    read_summary,
    write_json,
    write_text,
)
from trainkit.errors import UserError

FORMAT = 2  # raise it when the same file and settings would give other pixels or another layout
WORK_FOLDER, LOCK_NAME, PREPARATION_NAME = "work", ".lock", "preparation.json"
REJECTED_NAME = "rejected.jsonl"
TRANSIENT_FAULTS = {"unreadable", "crashed"}  # may be gone the next time though no file changed: tried again
OUTPUT_ERRORS = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOTDIR EEXIST ENOENT ENAMETOOLONG".split()
}


def dataset_fingerprint(source, settings: PreparationSettings) -> str:
    """Names the result: the same images (by path, size and time of change) and settings give the same one."""
    columns = (source.label_names, source.has_text, source.vector_length)
    return _digest(FORMAT, settings.identity, source.fingerprint, *columns)


def read_preparation(folder: Path) -> dict | None:
    """preparation.json of a complete prepared dataset; None where there is none, or its writing was cut short."""
    try:
        preparation = json.loads((folder / PREPARATION_NAME).read_text())
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return None
    return preparation if state.get("_fingerprint") == preparation.get("fingerprint") else None


def prepare(
    source,
    settings: PreparationSettings,
    output_dir: str | Path,
    num_proc: int = 0,
    show_progress: bool = True,
    output_flag: str = "--output_dir",
) -> dict:
    """Write `source` as a prepared dataset; returns what its preparation.json says.

    Does nothing where the folder already holds just that. `num_proc` 0 takes every core. Of two runs at one folder
    the second waits and finds the work done. Raises `UserError` where nothing can be read or written.
    """
    if num_proc < 0:
        raise UserError(f"--num_proc {num_proc} must be 0 (every core) or more")
    output_dir = Path(output_dir)
    with _output_errors(output_dir, output_flag):
        _claim_folder(output_dir, output_flag)
        with FileLock(output_dir / LOCK_NAME):
            fingerprint = dataset_fingerprint(source, settings)
            preparation = read_preparation(output_dir)
            if preparation and _is_current(preparation, output_dir, fingerprint, settings):
                if show_progress:
                    print(f"{output_dir} is up to date: {told_counts(preparation)}", flush=True)
                return preparation
            return _prepare(source, settings, output_dir, num_proc, show_progress, fingerprint)


def _prepare(source, settings, output_dir: Path, num_proc: int, show_progress: bool, fingerprint: str) -> dict:
    started = time.monotonic()
    writer = ShardWriter(source.reader, settings, source.label_names, source.has_text, source.vector_length)
    plan = _Plan(source, settings, output_dir)
    num_proc = 1 if plan.num_missing <= SLICE_ITEMS else num_proc or num_cores()
    already = len(source) - plan.num_missing
    with tqdm(total=len(source), initial=already, unit=" images", disable=None if show_progress else True) as bar:
        for job in run_jobs(writer, plan.next_job, num_proc):
            plan.finished(job)
            if isinstance(job, SliceJob):
                bar.update(len(job.items))
    preparation = _finalize(source, writer, output_dir, plan.shards, fingerprint)
    if show_progress:
        seconds = time.monotonic() - started
        megabytes = sum(shard["num_bytes"] for shard in preparation["shards"]) / 1e6
        print(f"{output_dir}: {told_counts(preparation)}, {megabytes:,.1f} MB")
        rate = plan.num_missing / max(seconds, 1e-9)
        print(f"prepared {plan.num_missing:,} files in {seconds:.1f} s, {rate:,.0f} images/s", flush=True)
    return preparation


class _Plan:
    """The slices and shards still to be made, in order; `shards` are the paths of all, in the source's order."""

    def __init__(self, source, settings: PreparationSettings, output_dir: Path):
        self.work = output_dir / WORK_FOLDER
        self.work.mkdir(exist_ok=True)
        self.shards, self.num_missing = [], 0
        missing_units = []
        columns = (source.label_names, source.has_text, source.vector_length)
        about_all = (FORMAT, settings.identity, *columns)
        for unit in source.units():
            path = output_dir / f"data-{_digest(about_all, unit.identity)}.arrow"
            self.shards.append(path)
            if not _is_done(path):
                missing_units.append((path, unit.items))
                self.num_missing += len(unit.items)
        self._slice_items = slice_items(settings)
        self._slices = self._missing_slices(missing_units)
        self._joins = deque()
        self._unfinished = {}  # slice -> the unit it is part of

    def next_job(self) -> SliceJob | JoinJob | None:
        """A job that can be done now; None while all that is left waits for others to be finished."""
        job = None if self._joins else next(self._slices, None)
        return self._joins.popleft() if self._joins and job is None else job

    def finished(self, job: SliceJob | JoinJob) -> None:
        if isinstance(job, SliceJob):
            unit = self._unfinished.pop(job.path)
            unit.missing.discard(job.path)
            if not unit.missing:
                self._joins.append(JoinJob(unit.shard, unit.slices))

    def _missing_slices(self, units: list[tuple[Path, Sequence]]) -> Iterator[SliceJob]:
        finished = {path.name for path in self.work.iterdir()}  # by a run that was killed
        for shard, items in units:
            starts = range(0, len(items), self._slice_items)
            slices = [self.work / f"{shard.stem}-{number:05d}.arrow" for number in range(len(starts))]
            unit = _Unit(shard, slices, {path for path in slices if path.name not in finished})
            if not unit.missing:
                self._joins.append(JoinJob(shard, slices))
            self._unfinished.update(dict.fromkeys(unit.missing, unit))
            for path, start in zip(slices, starts, strict=True):
                if path in unit.missing:
                    yield SliceJob(path, items[start : start + self._slice_items])


@dataclasses.dataclass
class _Unit:
    shard: Path
    slices: list[Path]
    missing: set[Path]


def slice_items(settings: PreparationSettings) -> int:
    """Images to a slice: fewer where they are large, so that one holds about `BATCH_BYTES` of pixels."""
    image_bytes = settings.height * settings.width * settings.channels * settings.dtype.itemsize
    return max(1, min(SLICE_ITEMS, BATCH_BYTES // image_bytes))


def _finalize(source, writer: ShardWriter, output_dir: Path, shards: list[Path], fingerprint: str) -> dict:
    """Write what makes the shards a dataset, the mark of completeness last; then sweep out what is not part of it."""
    rejected, classes, shard_files = [], Counter(), []
    for path in shards:
        with open_stream(path) as stream:
            summary = read_summary(stream.schema)
        rejected += summary["rejected"]
        classes.update(summary["classes"])
        size = path.stat().st_size
        shard_files.append({"filename": path.name, "num_rows": summary["num_rows"], "num_bytes": size})
    write_text(output_dir / REJECTED_NAME, "".join(json.dumps(line) + "\n" for line in rejected))
    num_images = sum(shard["num_rows"] for shard in shard_files)
    if num_images == 0:
        first = f"{rejected[0]['source']}: {rejected[0]['fault']}, {rejected[0]['message']}"
        raise UserError(
            f"no readable image in {source.name}: {len(rejected)} files rejected, the first {first}; "
            f"see {output_dir / REJECTED_NAME}"
        )
    label_names = source.label_names or []
    preparation = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "settings": dataclasses.asdict(writer.settings),
        "source": {"name": source.name, "fingerprint": source.fingerprint},
        "num_images": num_images,
        "rejected": dict(sorted(Counter(line["fault"] for line in rejected).items())),
        "classes": {name: classes[str(label)] for label, name in enumerate(label_names)},
        "columns": list(writer.features),
        "shards": shard_files,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("pillow", "numpy", "pyarrow")},
    }
    state = {
        "_data_files": [{"filename": path.name} for path in shards],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"citation": "", "description": "", "features": writer.features, "homepage": "", "license": ""}
    write_json(output_dir / "dataset_info.json", info)
    write_json(output_dir / "state.json", state)
    write_json(output_dir / PREPARATION_NAME, preparation)
    shutil.rmtree(output_dir / WORK_FOLDER)
    for path in {*output_dir.glob("data-*.arrow"), *output_dir.glob("*.tmp")} - set(shards):
        path.unlink()
    return read_preparation(output_dir)


def _is_current(preparation: dict, folder: Path, fingerprint: str, settings: PreparationSettings) -> bool:
    """Whether a complete dataset is the one that is wanted, undamaged, and without faults that may be gone by now."""
    training_size = settings.train_height, settings.train_width  # no part of the fingerprint
    if preparation["fingerprint"] != fingerprint or TRANSIENT_FAULTS & preparation["rejected"].keys():
        return False
    if tuple(preparation["settings"][name] for name in ("train_height", "train_width")) != training_size:
        return False
    paths = {folder / shard["filename"]: shard["num_bytes"] for shard in preparation["shards"]}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def told_counts(preparation: dict) -> str:
    """'1,998 images, 2 rejected (1 empty, 1 truncated)'."""
    told = f"{preparation['num_images']:,} images"
    rejected = preparation["rejected"]
    if rejected:
        faults = ", ".join(f"{count:,} {fault}" for fault, count in rejected.items())
        told += f", {sum(rejected.values()):,} rejected ({faults}; see {REJECTED_NAME})"
    return told


def _is_done(shard: Path) -> bool:
    """Whether a former run left the unit's shard, whole and with no fault in it that may be gone by now."""
    try:
        with open_stream(shard) as stream:
            summary = read_summary(stream.schema)
            num_rows = sum(batch.num_rows for batch in stream)  # a shard cut short raises
    except (OSError, pa.ArrowException, KeyError):
        return False
    return num_rows == summary["num_rows"] and not TRANSIENT_FAULTS & {line["fault"] for line in summary["rejected"]}


def _claim_folder(folder: Path, output_flag: str) -> None:
    """Create it, or make sure that it is one of ours: what is not part of the result gets deleted there."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir()}
    if names and not names & {LOCK_NAME, WORK_FOLDER, PREPARATION_NAME}:
        raise UserError(f"{output_flag} {folder} holds other files; give a new or empty folder")


@contextlib.contextmanager
def _output_errors(folder: Path, output_flag: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in OUTPUT_ERRORS:
            raise
        reason = error.strerror or str(error)
        raise UserError(
            f"{output_flag} {folder} cannot be written ({reason}); free space there or give another folder: "
            "what is finished stays, the same command goes on from it"
        ) from None


def _digest(*parts) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
