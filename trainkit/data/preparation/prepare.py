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
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from trainkit.data import faults
from trainkit.data.account import Account
from trainkit.data.files import (
    RemotePath,
    delete_folder,
    location,
    make_folder,
    read_schema,
    sizes,
    write_text,
)
from trainkit.data.format import (
    FORMAT,
    LOCK_NAME,
    PREPARATION_NAME,
    UNITS_FOLDER,
    VALIDATION_FOLDER,
    WORK_FOLDER,
    filters_of,
    format_counts,
    read_preparation,
)
from trainkit.data.preparation import deduplication
from trainkit.data.preparation.filtering import NO_FILTERS, FilterSettings
from trainkit.data.preparation.finalize import EARLY_FILES, Rejections, finalize, sweep_current
from trainkit.data.preparation.plan import Plan, done_units
from trainkit.data.preparation.pool import run_jobs, run_jobs_in_processes
from trainkit.data.preparation.shards import BATCH_BYTES, SLICE_ITEMS, ShardWriter, SliceJob, read_summary
from trainkit.data.settings import PreparationSettings
from trainkit.errors import UserError

NO_BYTES = {"train_height", "train_width"}  # settings that change no stored bytes
OUTPUT_ERRORS = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOTDIR EEXIST ENOENT ENAMETOOLONG".split()
}


def dataset_fingerprint(source, settings: PreparationSettings, filters: FilterSettings = NO_FILTERS) -> str:
    """Names the result: the same images (by path, size and time of change) and settings give the same one."""
    asked = settings.identity, dataclasses.astuple(filters)
    return _digest(FORMAT, *asked, source.fingerprint, *_columns(source))


def _columns(source) -> tuple:
    """What the columns beside the image depend on."""
    return source.label_names, source.has_text, source.vector_length


def prepare(
    source,
    settings: PreparationSettings,
    output_dir: str | Path | RemotePath,
    num_proc: int = 0,
    show_progress: bool = True,
    output_flag: str = "--output_dir",
    engine: Callable = run_jobs,
    work_dir: Path | None = None,
    *,
    filters: FilterSettings = NO_FILTERS,
    max_rejected_fraction: float = 1.0,
    overwrite: bool = False,
) -> dict:
    """Write `source` as a prepared dataset; returns what its preparation.json says.

    Does nothing where the folder already holds just that. `num_proc` 0 takes every core. `engine` runs the jobs, as
    `run_jobs` does. `work_dir` is a folder for what is half done where `output_dir` is at a URL (None: there too).
    Of two runs at one folder the second waits and finds the work done; so do two of one machine at a URL, while those
    of two machines do the same work twice. A dataset of another source or of other settings is replaced only with
    `overwrite`. Raises `UserError` where nothing can be read or written, or more than `max_rejected_fraction` of the
    files are rejected.
    """
    if num_proc < 0:
        raise UserError(f"--num_proc {num_proc} must be 0 (every core) or more")
    if not 0 <= max_rejected_fraction <= 1:
        raise UserError(f"--max_rejected_fraction {max_rejected_fraction:g} must be 0 to 1")
    output_dir = location(output_dir)
    check_output(output_dir, settings, filters, overwrite, output_flag)
    work = output_dir
    if isinstance(output_dir, RemotePath) and work_dir is not None:
        work = work_dir / _digest(output_dir.url)
    with _output_errors(output_dir, output_flag):
        make_folder(work)
        with FileLock(work / LOCK_NAME) if isinstance(work, Path) else contextlib.nullcontext():
            fingerprint = dataset_fingerprint(source, settings, filters)
            preparation = read_preparation(output_dir)
            if preparation and _is_current(preparation, output_dir, fingerprint, settings):
                if show_progress:
                    print(f"{output_dir} is up to date: {format_counts(preparation)}", flush=True)
                delete_folder(work / WORK_FOLDER)  # a run was killed after all was done
                sweep_current(output_dir)
                return preparation
            if not overwrite:  # again: another run may have been here since
                _refuse_other_settings(preparation, output_dir, settings, filters, output_flag)
            writer = ShardWriter(source.reader, settings, *_columns(source), filters)
            units = _units(source, writer, output_dir)
            if preparation and not overwrite and _is_of_other_images(preparation, source, units):
                held = f"a dataset of other images ({preparation['source']['name']}, now {source.name})"
                raise _replacing(output_dir, output_flag, held)
            make_folder(work / WORK_FOLDER)
            few = partial(run_jobs if engine is run_jobs else run_jobs_in_processes, num_proc=1)
            engines = partial(engine, num_proc=num_proc), few
            rejections = Rejections(max_rejected_fraction, len(source))
            return _prepare(
                source, writer, units, output_dir, work / WORK_FOLDER, engines, show_progress, fingerprint, rejections
            )


def _units(source, writer: ShardWriter, output_dir: Path | RemotePath) -> list[tuple[Path | RemotePath, Sequence]]:
    """The shard and the items of each unit of work, in the source's order."""
    about_all = (FORMAT, writer.settings.identity, writer.filters.unit_key, *_columns(source))
    return [(output_dir / f"data-{_digest(about_all, unit.identity)}.arrow", unit.items) for unit in source.units()]


def _is_of_other_images(preparation: dict, source, units: list) -> bool:
    """Whether neither the source's name nor a unit is that of the dataset that is there: a folder may be moved."""
    names = {shard.stem for shard, _ in units}
    held = {"-".join(shard["filename"].removesuffix(".arrow").split("-")[:2]) for shard in preparation["shards"]}
    return preparation["source"]["name"] != source.name and not names & held


def check_output(
    output_dir: Path | RemotePath,
    settings: PreparationSettings,
    filters: FilterSettings,
    overwrite: bool,
    output_flag: str = "--output_dir",
) -> None:
    """Make the folder, and raise a `UserError` where it cannot be written, or holds what must not be replaced.

    Quick, and needs no source: so a mistake is found before a long listing.
    """
    with _output_errors(output_dir, output_flag):
        _claim_folder(output_dir, output_flag)
        if isinstance(output_dir, Path):  # at a URL claiming it has written something
            with tempfile.TemporaryFile(dir=output_dir):
                pass
    if not overwrite:
        _refuse_other_settings(read_preparation(output_dir), output_dir, settings, filters, output_flag)


def _refuse_other_settings(held: dict | None, output_dir, settings, filters, output_flag: str) -> None:
    if held is None:
        return
    before = held["settings"] | filters_of(held)
    now = json.loads(json.dumps(dataclasses.asdict(settings) | dataclasses.asdict(filters)))
    changed = [
        f"{name} {before[name]}, now {value}"
        for name, value in now.items()
        if before.get(name, value) != value and not name.startswith("train_")  # no stored byte depends on those
    ]
    if changed:
        raise _replacing(output_dir, output_flag, f"a dataset of other settings ({'; '.join(changed)})")


def _replacing(folder: Path | RemotePath, output_flag: str, held: str) -> UserError:
    return UserError(
        f"{output_flag} {folder} holds {held}: give another folder, or --overwrite_output_dir to replace it"
    )


def _prepare(source, writer, units, output_dir, work, engines, show_progress, fingerprint, rejections) -> dict:
    started = time.monotonic()
    settings, filters = writer.settings, writer.filters
    shards = [shard for shard, _ in units]
    if filters.validation_fraction:
        make_folder(output_dir / VALIDATION_FOLDER)
    if filters.deduplicate != "none":
        make_folder(output_dir / UNITS_FOLDER)
        done = deduplication.done_units(output_dir, shards, filters)
    else:
        done = done_units(shards, filters.sides)
    plan = Plan(units, work, slice_items(settings), done)
    num_seen = 0
    for num_files, rejected in plan.earlier_results():
        rejections.add(rejected)
        num_seen += num_files
    engine = engines[plan.num_missing <= SLICE_ITEMS]
    already = len(source) - plan.num_missing
    with tqdm(total=len(source), initial=already, unit=" images", disable=None if show_progress else True) as bar:
        for job in engine(writer, plan.next_job):
            if isinstance(job, SliceJob):
                num_seen += len(job.items)
                if rejections.max_fraction < 1:
                    rejections.add(read_summary(read_schema(job.path))["rejected"])
                    if EARLY_FILES <= num_seen < len(source):
                        rejections.check(num_seen)
                bar.update(len(job.items))
            plan.finished(job)
    preparation = finalize(source, writer, output_dir, shards, fingerprint, rejections.max_fraction)
    delete_folder(work)
    if show_progress:
        seconds = time.monotonic() - started
        megabytes = sum(shard["num_bytes"] for shard in preparation["shards"]) / 1e6
        print(f"{output_dir}: {format_counts(preparation)}, {megabytes:,.1f} MB")
        rate = plan.num_missing / max(seconds, 1e-9)
        print(f"prepared {plan.num_missing:,} files in {seconds:.1f} s, {rate:,.0f} images/s", flush=True)
        print_account(preparation)
    return preparation


def print_account(preparation: dict) -> None:
    """Print what happened to everything that was found besides the images, a line each."""
    account = Account.from_json(preparation.get("account", {}), preparation["ignored"])
    for line in account.lines():
        print(f"  {line}", flush=True)


def slice_items(settings: PreparationSettings) -> int:
    """Images to a slice: fewer where they are large, so that one holds about `BATCH_BYTES` of pixels."""
    image_bytes = settings.height * settings.width * settings.channels * settings.dtype.itemsize
    return max(1, min(SLICE_ITEMS, BATCH_BYTES // image_bytes))


def _is_current(preparation: dict, folder: Path | RemotePath, fingerprint: str, settings: PreparationSettings) -> bool:
    """Whether a complete dataset is the one that is wanted, undamaged, and without faults that may be gone by now."""
    training_size = settings.train_height, settings.train_width  # no part of the fingerprint
    if preparation["fingerprint"] != fingerprint or faults.TRANSIENT & preparation["rejected"].keys():
        return False
    if tuple(preparation["settings"][name] for name in ("train_height", "train_width")) != training_size:
        return False
    present = sizes(folder)
    if not all(present.get(shard["filename"]) == shard["num_bytes"] for shard in preparation["shards"]):
        return False
    if not filters_of(preparation)["validation_fraction"]:
        return True
    held_out, present = read_preparation(folder / VALIDATION_FOLDER), sizes(folder / VALIDATION_FOLDER)
    shards = held_out["shards"] if held_out else [{"filename": "", "num_bytes": 0}]
    return all(present.get(shard["filename"]) == shard["num_bytes"] for shard in shards)


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
