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
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from trainkit.data.files import (
    RemotePath,
    delete,
    delete_folder,
    for_each,
    location,
    make_folder,
    read_schema,
    read_text,
    sizes,
    write_json,
    write_text,
)
from trainkit.data.plan import TRANSIENT_FAULTS, Plan
from trainkit.data.pool import run_jobs
from trainkit.data.settings import PreparationSettings
from trainkit.data.shards import BATCH_BYTES, SLICE_ITEMS, ShardWriter, SliceJob, read_summary
from trainkit.errors import UserError

FORMAT = 2  # raise it when the same file and settings would give other pixels or another layout
WORK_FOLDER, LOCK_NAME, PREPARATION_NAME = "work", ".lock", "preparation.json"
REJECTED_NAME = "rejected.jsonl"
OUTPUT_ERRORS = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOTDIR EEXIST ENOENT ENAMETOOLONG".split()
}


def dataset_fingerprint(source, settings: PreparationSettings) -> str:
    """Names the result: the same images (by path, size and time of change) and settings give the same one."""
    columns = (source.label_names, source.has_text, source.vector_length)
    return _digest(FORMAT, settings.identity, source.fingerprint, *columns)


def read_preparation(folder: Path | RemotePath) -> dict | None:
    """preparation.json of a complete prepared dataset; None where there is none, or its writing was cut short."""
    try:
        preparation = json.loads(read_text(folder / PREPARATION_NAME))
        state = json.loads(read_text(folder / "state.json"))
    except (OSError, ValueError):
        return None
    return preparation if state.get("_fingerprint") == preparation.get("fingerprint") else None


def prepare(
    source,
    settings: PreparationSettings,
    output_dir: str | Path | RemotePath,
    num_proc: int = 0,
    show_progress: bool = True,
    output_flag: str = "--output_dir",
    engine: Callable = run_jobs,
    work_dir: Path | None = None,
) -> dict:
    """Write `source` as a prepared dataset; returns what its preparation.json says.

    Does nothing where the folder already holds just that. `num_proc` 0 takes every core. `engine` runs the jobs, as
    `run_jobs` does. `work_dir` is a folder for what is half done where `output_dir` is at a URL (None: there too).
    Of two runs at one folder the second waits and finds the work done; so do two of one machine at a URL, while those
    of two machines do the same work twice. Raises `UserError` where nothing can be read or written.
    """
    if num_proc < 0:
        raise UserError(f"--num_proc {num_proc} must be 0 (every core) or more")
    output_dir = location(output_dir)
    work = output_dir
    if isinstance(output_dir, RemotePath) and work_dir is not None:
        work = work_dir / _digest(output_dir.url)
    with _output_errors(output_dir, output_flag):
        _claim_folder(output_dir, output_flag)
        make_folder(work)
        with FileLock(work / LOCK_NAME) if isinstance(work, Path) else contextlib.nullcontext():
            fingerprint = dataset_fingerprint(source, settings)
            preparation = read_preparation(output_dir)
            if preparation and _is_current(preparation, output_dir, fingerprint, settings):
                if show_progress:
                    print(f"{output_dir} is up to date: {told_counts(preparation)}", flush=True)
                delete_folder(work / WORK_FOLDER)  # a run was killed after all was done
                _sweep(output_dir, preparation, None)
                return preparation
            make_folder(work / WORK_FOLDER)
            run = partial(engine, num_proc=num_proc)
            return _prepare(source, settings, output_dir, work / WORK_FOLDER, run, show_progress, fingerprint)


def _prepare(source, settings, output_dir, work, engine: Callable, show_progress: bool, fingerprint: str) -> dict:
    started = time.monotonic()
    columns = (source.label_names, source.has_text, source.vector_length)
    writer = ShardWriter(source.reader, settings, *columns)
    about_all = (FORMAT, settings.identity, *columns)
    units = [(output_dir / f"data-{_digest(about_all, unit.identity)}.arrow", unit.items) for unit in source.units()]
    plan = Plan(units, work, slice_items(settings))
    if plan.num_missing <= SLICE_ITEMS:
        engine = partial(run_jobs, num_proc=1)
    already = len(source) - plan.num_missing
    with tqdm(total=len(source), initial=already, unit=" images", disable=None if show_progress else True) as bar:
        for job in engine(writer, plan.next_job):
            plan.finished(job)
            if isinstance(job, SliceJob):
                bar.update(len(job.items))
    preparation = _finalize(source, writer, output_dir, [shard for shard, _ in units], fingerprint)
    delete_folder(work)
    if show_progress:
        seconds = time.monotonic() - started
        megabytes = sum(shard["num_bytes"] for shard in preparation["shards"]) / 1e6
        print(f"{output_dir}: {told_counts(preparation)}, {megabytes:,.1f} MB")
        rate = plan.num_missing / max(seconds, 1e-9)
        print(f"prepared {plan.num_missing:,} files in {seconds:.1f} s, {rate:,.0f} images/s", flush=True)
    return preparation


def slice_items(settings: PreparationSettings) -> int:
    """Images to a slice: fewer where they are large, so that one holds about `BATCH_BYTES` of pixels."""
    image_bytes = settings.height * settings.width * settings.channels * settings.dtype.itemsize
    return max(1, min(SLICE_ITEMS, BATCH_BYTES // image_bytes))


def _finalize(source, writer: ShardWriter, output_dir: Path | RemotePath, shards: list, fingerprint: str) -> dict:
    """Write what makes the shards a dataset, the mark of completeness last; then sweep out what is not part of it."""
    rejected, classes, shard_files = [], Counter(), []
    replaced, present = read_preparation(output_dir), sizes(output_dir)
    for path, schema in zip(shards, for_each(read_schema, shards), strict=True):
        summary = read_summary(schema)
        rejected += summary["rejected"]
        classes.update(summary["classes"])
        shard_files.append({"filename": path.name, "num_rows": summary["num_rows"], "num_bytes": present[path.name]})
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
    _sweep(output_dir, preparation, replaced)
    return read_preparation(output_dir)


def _sweep(output_dir: Path | RemotePath, preparation: dict, replaced: dict | None) -> None:
    """Delete what is no part of the result.

    At a URL, where no lock keeps others away, only what belonged to the dataset that was there before.
    """
    if isinstance(output_dir, RemotePath):
        names = {shard["filename"] for shard in (replaced or {}).get("shards", ())}
    else:
        names = {path.name for pattern in ("data-*.arrow", "*.tmp") for path in output_dir.glob(pattern)}
    for name in names - {shard["filename"] for shard in preparation["shards"]}:
        delete(output_dir / name)


def _is_current(preparation: dict, folder: Path | RemotePath, fingerprint: str, settings: PreparationSettings) -> bool:
    """Whether a complete dataset is the one that is wanted, undamaged, and without faults that may be gone by now."""
    training_size = settings.train_height, settings.train_width  # no part of the fingerprint
    if preparation["fingerprint"] != fingerprint or TRANSIENT_FAULTS & preparation["rejected"].keys():
        return False
    if tuple(preparation["settings"][name] for name in ("train_height", "train_width")) != training_size:
        return False
    present = sizes(folder)
    return all(present.get(shard["filename"]) == shard["num_bytes"] for shard in preparation["shards"])


def told_counts(preparation: dict) -> str:
    """'1,998 images, 2 rejected (1 empty, 1 truncated)'."""
    told = f"{preparation['num_images']:,} images"
    rejected = preparation["rejected"]
    if rejected:
        faults = ", ".join(f"{count:,} {fault}" for fault, count in rejected.items())
        told += f", {sum(rejected.values()):,} rejected ({faults}; see {REJECTED_NAME})"
    return told


def _claim_folder(folder: Path | RemotePath, output_flag: str) -> None:
    """Create it, or make sure that it is one of ours: what is not part of the result gets deleted there."""
    make_folder(folder)
    names = sizes(folder).keys()
    if names and not names & {LOCK_NAME, WORK_FOLDER, PREPARATION_NAME}:
        raise UserError(f"{output_flag} {folder} holds other files; give a new or empty folder")
    if isinstance(folder, RemotePath) and LOCK_NAME not in names:
        write_text(folder / LOCK_NAME, "")  # no lock there, but a mark that the place is ours


@contextlib.contextmanager
def _output_errors(folder: Path | RemotePath, output_flag: str) -> Iterator[None]:
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
