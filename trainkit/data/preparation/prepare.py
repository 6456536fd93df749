"""Turn images into a prepared dataset: a folder of decoded images in Arrow shards that opens by memory map.

The source is cut into work units of about 2,000 images. Each is a pure function of its files and the settings, and
becomes one shard, named by a hash of both. So the result does not depend on the number of processes, a killed run
continues where it stopped, and files that were added or changed cost only their own units.
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from trainkit.data import faults
from trainkit.data.account import Account
from trainkit.data.files import RemotePath, location, make_folder, read_schema, sizes
from trainkit.data.format import (
    FORMAT,
    LOCK_NAME,
    UNITS_FOLDER,
    VALIDATION_FOLDER,
    WORK_FOLDER,
    filters_of,
    format_counts,
    read_preparation,
)
from trainkit.data.preparation import deduplication
from trainkit.data.preparation.filtering import NO_FILTERS, FilterSettings
from trainkit.data.preparation.finalize import EARLY_FILES, Rejections, delete_after_kill, finalize
from trainkit.data.preparation.output import (
    check_output,
    delete_own_files,
    other_settings,
    output_errors,
    refuse_other_pairs,
    refuse_other_settings,
    replacing_error,
)
from trainkit.data.preparation.plan import Plan, done_units
from trainkit.data.preparation.pool import run_jobs, run_jobs_in_processes
from trainkit.data.preparation.shards import BATCH_BYTES, SLICE_ITEMS, JoinJob, ShardWriter, SliceJob, read_summary
from trainkit.data.settings import PreparationSettings
from trainkit.data.sources.source import Source
from trainkit.errors import UserError
from trainkit.locking import locked
from trainkit.terminal import Progress, say

SHOWN_CLASSES = 3
Unit = tuple[Path | RemotePath, Sequence]  # a shard and its items


class Engine(Protocol):
    """Runs the jobs that `next_job()` returns (None: nothing at present); yields each when it is done."""

    def __call__(
        self, writer: ShardWriter, next_job: Callable[[], SliceJob | JoinJob | None], num_proc: int
    ) -> Iterator[SliceJob | JoinJob]: ...


class Task(NamedTuple):
    """One preparation: its source, settings and folders."""

    source: Source
    writer: ShardWriter
    units: list[Unit]
    output_dir: Path | RemotePath
    work: Path | RemotePath  # the folder for slices
    fingerprint: str
    show_progress: bool


def dataset_fingerprint(source: Source, settings: PreparationSettings, filters: FilterSettings = NO_FILTERS) -> str:
    """Return the name of the result: a hash of the images (path, size and time of change) and the settings."""
    return _digest(FORMAT, settings.identity, *filters.identity, source.fingerprint, *_columns(source))


def _columns(source: Source) -> tuple:
    """Return the values that the columns next to the image depend on; without pairs as before there were any."""
    columns = source.label_names, source.has_text, source.vector_length
    return columns if source.pairs is None else (*columns, dataclasses.astuple(source.pairs))


def prepare(
    source: Source,
    settings: PreparationSettings,
    output_dir: str | Path | RemotePath,
    num_proc: int = 0,
    show_progress: bool = True,
    output_flag: str = "--output_dir",
    engine: Engine = run_jobs,
    work_dir: Path | None = None,
    *,
    filters: FilterSettings = NO_FILTERS,
    max_rejected_fraction: float = 1.0,
    overwrite: bool = False,
) -> dict:
    """Write `source` as a prepared dataset; returns the contents of its preparation.json.

    Does nothing if the folder holds exactly that already, which then need not be writable. `num_proc` 0 uses every
    core. `engine` runs the jobs. `work_dir` is a local folder for unfinished work if `output_dir` is a URL (None: at
    the URL as well). Of two runs in one folder the second waits for the first and finds the work done; so do two runs
    of one machine at a URL, while two machines do the same work twice. With `overwrite` a dataset of another
    source or of other settings is replaced.

    Raises:
        UserError: nothing can be read or written, or more than `max_rejected_fraction` of the files are rejected.
    """
    if num_proc < 0:
        raise UserError(f"--num_proc {num_proc} must be 0 (every core) or more")
    if not 0 <= max_rejected_fraction <= 1:
        raise UserError(f"--max_rejected_fraction {max_rejected_fraction:g} must be 0 to 1")
    output_dir = location(output_dir)
    check_output(output_dir, settings, filters, overwrite, output_flag)
    fingerprint = dataset_fingerprint(source, settings, filters)
    held = read_preparation(output_dir)
    if held and _is_current(held, output_dir, fingerprint, settings):
        return _up_to_date(held, output_dir, show_progress)
    work = output_dir
    if isinstance(output_dir, RemotePath) and work_dir is not None:
        work = work_dir / _digest(output_dir.url)
    with output_errors(output_dir, output_flag), _lock(work, output_flag, show_progress):
        held = read_preparation(output_dir)  # again: another run may have been here since
        if held and _is_current(held, output_dir, fingerprint, settings):
            return _up_to_date(held, output_dir, show_progress)
        if not overwrite:
            refuse_other_settings(held, output_dir, settings, filters, output_flag)
            refuse_other_pairs(held, output_dir, source.pairs, output_flag)
        columns = source.label_names, source.has_text, source.vector_length
        writer = ShardWriter(source.reader, settings, *columns, filters, source.pairs)
        units = _units(source, writer, output_dir)
        if held and not overwrite and _is_of_other_images(held, source, units):
            what = f"a dataset of other images ({held['source']['name']}, now {source.name})"
            raise replacing_error(output_dir, output_flag, what)
        if held and show_progress:
            say(f"{output_dir} is prepared again: {_why_again(held, output_dir, source, writer)}")
        make_folder(work / WORK_FOLDER)
        few = partial(run_jobs if engine is run_jobs else run_jobs_in_processes, num_proc=1)
        engines = partial(engine, num_proc=num_proc), few
        task = Task(source, writer, units, output_dir, work / WORK_FOLDER, fingerprint, show_progress)
        return _run(task, engines, Rejections(max_rejected_fraction, len(source)))


@contextlib.contextmanager
def _lock(work: Path | RemotePath, output_flag: str, show_progress: bool) -> Iterator[None]:
    """Keep other preparations out of a local folder; at a URL there is no lock."""
    make_folder(work)
    if isinstance(work, RemotePath):
        yield
        return

    def announce(holder: str) -> None:
        if show_progress:
            say(f"{output_flag} {work} is being prepared by {holder}: waiting for it to finish")

    with locked(work / LOCK_NAME, announce):
        yield


def _up_to_date(preparation: dict, output_dir: Path | RemotePath, show_progress: bool) -> dict:
    if show_progress:
        say(f"{output_dir} is up to date: {format_counts(preparation)}")
    with contextlib.suppress(OSError):  # a finished dataset may be read-only
        delete_own_files(output_dir / WORK_FOLDER, everything=True)
        delete_after_kill(output_dir)
    return preparation


def _units(source: Source, writer: ShardWriter, output_dir: Path | RemotePath) -> list[Unit]:
    """Return the shard and the items of each work unit, in the source's order."""
    about_all = (FORMAT, writer.settings.identity, writer.filters.unit_key, *_columns(source))
    return [(output_dir / f"data-{_digest(about_all, unit.identity)}.arrow", unit.items) for unit in source.units()]


def _is_of_other_images(preparation: dict, source: Source, units: list[Unit]) -> bool:
    """Whether the dataset in the folder has neither the source's name nor one of its units: a folder may be moved."""
    names = {shard.stem for shard, _ in units}
    held = {"-".join(shard["filename"].removesuffix(".arrow").split("-")[:2]) for shard in preparation["shards"]}
    return preparation["source"]["name"] != source.name and not names & held


def _why_again(held: dict, folder: Path | RemotePath, source: Source, writer: ShardWriter) -> str:
    """Why a finished dataset is prepared again, and how much of it."""
    if changed := other_settings(held, writer.settings, writer.filters):
        return f"its settings differ ({'; '.join(changed)})"
    before, now = list(held["classes"] or {}), source.label_names or []
    if sorted(before) != sorted(now):
        return f"its classes differ ({format_classes(before)}, now {format_classes(now)}), so every image is read"
    if faults.TRANSIENT & held["rejected"].keys():
        return "files that could not be read are tried again"
    if not _shards_are_there(held, folder):
        return "files of it are missing or cut short, and are made again"
    return "images, or what belongs to them, were added, changed or removed; the rest is kept"


def format_classes(names: list[str]) -> str:
    """'none', or '10: cat, dog, horse, ...'."""
    shown = ", ".join(names[:SHOWN_CLASSES]) + (", ..." if len(names) > SHOWN_CLASSES else "")
    return f"{len(names)}: {shown}" if names else "none"


def _run(task: Task, engines: tuple[Callable, Callable], rejections: Rejections) -> dict:
    """Do the missing work; `engines` are for many and for few files."""
    started = time.monotonic()
    filters, shards = task.writer.filters, [shard for shard, _ in task.units]
    if filters.validation_fraction:
        make_folder(task.output_dir / VALIDATION_FOLDER)
    if filters.deduplicate != "none":
        make_folder(task.output_dir / UNITS_FOLDER)
        done = deduplication.done_units(task.output_dir, shards, filters)
    else:
        done = done_units(shards, filters.splits)
    plan = Plan(task.units, task.work, slice_items(task.writer.settings), done)
    _run_jobs(task, plan, engines[plan.num_missing <= SLICE_ITEMS], rejections)
    preparation = finalize(
        task.source, task.writer, task.output_dir, shards, task.fingerprint, rejections.max_fraction
    )
    delete_own_files(task.work, everything=True)
    if task.show_progress:
        seconds = time.monotonic() - started
        megabytes = sum(shard["num_bytes"] for shard in preparation["shards"]) / 1e6
        say(f"{task.output_dir}: {format_counts(preparation)}, {_contents(preparation)}, {megabytes:,.1f} MB")
        rate = plan.num_missing / max(seconds, 1e-9)
        say(f"prepared {plan.num_missing:,} files in {seconds:.1f} s, {rate:,.0f} images/s")
        print_account(preparation)
    return preparation


def _contents(preparation: dict) -> str:
    """'28x28 L, 10 classes': what the images are."""
    settings, classes = preparation["settings"], preparation["classes"]
    size = f"{settings['height']}x{settings['width']} {settings['image_mode']}"
    return f"{size}, {len(classes)} classes" if classes else size


def _run_jobs(task: Task, plan: Plan, engine: Callable, rejections: Rejections) -> None:
    num_files, num_seen = len(task.source), 0
    for count, rejected in plan.earlier_results():
        rejections.add(rejected)
        num_seen += count
    done, hidden = num_files - plan.num_missing, not task.show_progress
    with Progress("preparing", num_files, "images", done, hidden) as progress:
        for job in engine(task.writer, plan.next_job):
            if isinstance(job, SliceJob):
                num_seen += len(job.items)
                if rejections.max_fraction < 1:
                    rejections.add(read_summary(read_schema(job.path))["rejected"])
                    if EARLY_FILES <= num_seen < num_files:
                        rejections.check(num_seen)
                progress.advance(len(job.items))
            plan.mark_done(job)


def print_account(preparation: dict) -> None:
    """Print the account of everything that was found, one line per kind."""
    for line in Account.from_json(preparation.get("account", {}), preparation["ignored"]).lines():
        say(f"  {line}")


def slice_items(settings: PreparationSettings) -> int:
    """Return the number of images per slice: fewer if they are large, so that one holds about `BATCH_BYTES`."""
    image_bytes = settings.height * settings.width * settings.channels * settings.dtype.itemsize
    return max(1, min(SLICE_ITEMS, BATCH_BYTES // image_bytes))


def _is_current(preparation: dict, folder: Path | RemotePath, fingerprint: str, settings: PreparationSettings) -> bool:
    """Whether a complete dataset is the requested one, undamaged, and without faults that may have disappeared."""
    training_size = settings.train_height, settings.train_width  # not part of the fingerprint
    if preparation["fingerprint"] != fingerprint or faults.TRANSIENT & preparation["rejected"].keys():
        return False
    if tuple(preparation["settings"][name] for name in ("train_height", "train_width")) != training_size:
        return False
    if not _shards_are_there(preparation, folder):
        return False
    if not filters_of(preparation)["validation_fraction"]:
        return True
    held_out = read_preparation(folder / VALIDATION_FOLDER)
    return held_out is not None and _shards_are_there(held_out, folder / VALIDATION_FOLDER)


def _shards_are_there(preparation: dict, folder: Path | RemotePath) -> bool:
    present = sizes(folder)
    return all(present.get(shard["filename"]) == shard["num_bytes"] for shard in preparation["shards"])


def _digest(*parts) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
