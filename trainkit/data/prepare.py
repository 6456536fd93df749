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
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock
from PIL import ImageColor
from tqdm import tqdm

from trainkit.data.finalize import (
    EARLY_FILES,
    FORMAT,
    LOCK_NAME,
    PREPARATION_NAME,
    WORK_FOLDER,
    Rejections,
    finalize,
    read_preparation,
    told_counts,
)
from trainkit.data.hygiene import AS_IT_IS, TRAIN, HygieneSettings
from trainkit.data.images import PreparationSettings
from trainkit.data.pieces import Pieces
from trainkit.data.pool import num_cores, run_jobs
from trainkit.data.shards import (
    BATCH_BYTES,
    SLICE_ITEMS,
    UNITS_FOLDER,
    VALIDATION_FOLDER,
    JoinJob,
    ShardWriter,
    SliceJob,
    open_stream,
    read_shard,
    read_summary,
    side_path,
)
from trainkit.errors import UserError

DEFAULT_RESOLUTION = "64"
TRANSIENT_FAULTS = {"unreadable", "crashed"}  # may be gone the next time though no file changed: tried again
OUTPUT_ERRORS = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOTDIR EEXIST ENOENT ENAMETOOLONG".split()
}


def settings_from_options(options) -> PreparationSettings:
    """What a script's `ImageOptions` ask for. Raises `UserError` naming the flag."""
    height, width = parse_resolution(options.resolution or DEFAULT_RESOLUTION)
    try:
        background = ImageColor.getrgb(options.background)[:3]
    except ValueError:
        raise UserError(f"--background {options.background} is no colour; give a name or #rrggbb") from None
    bit_depth = 16 if options.preserve_input_precision else 8
    return PreparationSettings(height, width, options.center_crop, options.image_mode, background, bit_depth)


def parse_resolution(resolution: str) -> tuple[int, int]:
    """'64' -> (64, 64); '64x96' -> height 64, width 96. Raises `UserError`."""
    sides = str(resolution).lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise UserError(f"--resolution {resolution} is not a size; give pixels, or HEIGHTxWIDTH as in 64x96")
    return int(sides[0]), int(sides[-1])


def dataset_fingerprint(source, settings: PreparationSettings, hygiene: HygieneSettings = AS_IT_IS) -> str:
    """Names the result: the same images (by path, size and time of change) and settings give the same one."""
    asked = dataclasses.astuple(settings), dataclasses.astuple(hygiene)
    return _digest(FORMAT, *asked, source.fingerprint, source.label_names, source.has_text)


def prepare(
    source,
    settings: PreparationSettings,
    output_dir: str | Path,
    num_proc: int = 0,
    show_progress: bool = True,
    output_flag: str = "--output_dir",
    *,
    hygiene: HygieneSettings = AS_IT_IS,
    max_rejected_fraction: float = 1.0,
    overwrite: bool = False,
) -> dict:
    """Write `source` as a prepared dataset; returns what its preparation.json says.

    Does nothing where the folder already holds just that. `num_proc` 0 takes every core. Of two runs at one folder
    the second waits and finds the work done. A dataset of another source or of other settings is replaced only with
    `overwrite`. Raises `UserError` where nothing can be read or written, or more than `max_rejected_fraction` of the
    files are rejected.
    """
    if num_proc < 0:
        raise UserError(f"--num_proc {num_proc} must be 0 (every core) or more")
    if not 0 <= max_rejected_fraction <= 1:
        raise UserError(f"--max_rejected_fraction {max_rejected_fraction:g} must be 0 to 1")
    output_dir = Path(output_dir)
    check_output(output_dir, settings, hygiene, overwrite, output_flag)
    with _output_errors(output_dir, output_flag), FileLock(output_dir / LOCK_NAME):
        fingerprint = dataset_fingerprint(source, settings, hygiene)
        preparation = read_preparation(output_dir)
        if preparation and _is_current(preparation, output_dir, fingerprint):
            if show_progress:
                print(f"{output_dir} is up to date: {told_counts(preparation)}", flush=True)
            return preparation
        if preparation and preparation["source"]["name"] != source.name and not overwrite:
            held = f"a dataset of other images ({preparation['source']['name']}, now {source.name})"
            raise _replacing(output_dir, output_flag, held)
        plan = _Plan(source, settings, hygiene, output_dir)
        preparation = _prepare(source, plan, num_proc, show_progress, fingerprint, max_rejected_fraction)
    return preparation


def check_output(
    output_dir: Path,
    settings: PreparationSettings,
    hygiene: HygieneSettings,
    overwrite: bool,
    output_flag: str = "--output_dir",
) -> None:
    """Make the folder, and raise a `UserError` where it cannot be written, or holds what must not be replaced.

    Quick, and needs no source: so a mistake is found before a long listing.
    """
    with _output_errors(output_dir, output_flag):
        _claim_folder(output_dir, output_flag)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    held = read_preparation(output_dir)
    if held is None or overwrite:
        return
    before = held["settings"] | held.get("hygiene", {})
    now = json.loads(json.dumps(dataclasses.asdict(settings) | dataclasses.asdict(hygiene)))
    changed = [
        f"{name} {before[name]}, now {value}" for name, value in now.items() if before.get(name, value) != value
    ]
    if changed:
        raise _replacing(output_dir, output_flag, f"a dataset of other settings ({'; '.join(changed)})")


def _replacing(folder: Path, output_flag: str, held: str) -> UserError:
    return UserError(
        f"{output_flag} {folder} holds {held}: give another folder, or --overwrite_output_dir to replace it"
    )


def _prepare(
    source, plan: "_Plan", num_proc: int, show_progress: bool, fingerprint: str, max_rejected_fraction: float
) -> dict:
    started = time.monotonic()
    rejections, num_seen = Rejections(max_rejected_fraction, len(source)), 0
    for num_files, rejected in plan.told_before():
        rejections.add(rejected)
        num_seen += num_files
    num_proc = 1 if plan.num_missing <= SLICE_ITEMS else num_proc or num_cores()
    already = len(source) - plan.num_missing
    with tqdm(total=len(source), initial=already, unit=" images", disable=None if show_progress else True) as bar:
        for job in run_jobs(plan.writer, plan.next_job, num_proc):
            if isinstance(job, SliceJob):
                with open_stream(job.path) as stream:
                    rejections.add(read_summary(stream.schema)["rejected"])
                num_seen += len(job.items)
                if EARLY_FILES <= num_seen < len(source):
                    rejections.check(num_seen)
                bar.update(len(job.items))
            plan.finished(job)
    output_dir = plan.output_dir
    preparation = finalize(source, plan.writer, output_dir, plan.shards, fingerprint, max_rejected_fraction)
    if show_progress:
        seconds = time.monotonic() - started
        megabytes = sum(shard["num_bytes"] for shard in preparation["shards"]) / 1e6
        print(f"{output_dir}: {told_counts(preparation)}, {megabytes:,.1f} MB")
        rate = plan.num_missing / max(seconds, 1e-9)
        print(f"prepared {plan.num_missing:,} files in {seconds:.1f} s, {rate:,.0f} images/s", flush=True)
    return preparation


class _Plan:
    """The slices and shards still to be made, in order; `shards` are the paths of all, in the source's order."""

    def __init__(self, source, settings: PreparationSettings, hygiene: HygieneSettings, output_dir: Path):
        self.writer = ShardWriter(source.reader, settings, source.label_names, source.has_text, hygiene)
        self.output_dir = output_dir
        self.work = output_dir / WORK_FOLDER
        self.work.mkdir(exist_ok=True)
        pieces = None
        if hygiene.validation_fraction:
            (output_dir / VALIDATION_FOLDER).mkdir(exist_ok=True)
        if hygiene.deduplicate != "none":
            (output_dir / UNITS_FOLDER).mkdir(exist_ok=True)
            pieces = Pieces(output_dir)
        self.shards, self.num_missing = [], 0
        self._done = []  # for each unit that is: how many files, and those rejected
        missing_units = []
        about_all = (FORMAT, dataclasses.astuple(settings), hygiene.unit_key, source.label_names, source.has_text)
        for unit in source.units():
            path = output_dir / f"data-{_digest(about_all, unit.identity)}.arrow"
            self.shards.append(path)
            rejected = _told_if_done(path, hygiene, pieces)
            if rejected is None:
                missing_units.append((path, unit.items))
                self.num_missing += len(unit.items)
            else:
                self._done.append((len(unit.items), rejected))
        self._slice_items = slice_items(settings)
        self._slices = self._missing_slices(missing_units)
        self._joins = deque()
        self._unfinished = {}  # slice -> the unit it is part of

    def told_before(self) -> Iterator[tuple[int, list[dict]]]:
        """Numbers of files that former runs are done with, and the rejected among them."""
        yield from self._done
        for path in self.work.glob("*.arrow"):
            with open_stream(path) as stream:
                summary = read_summary(stream.schema)
            yield len(summary["facts"]) + len(summary["rejected"]), summary["rejected"]

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


def _is_current(preparation: dict, folder: Path, fingerprint: str) -> bool:
    """Whether a complete dataset is the one that is wanted, undamaged, and without faults that may be gone by now."""
    if preparation["fingerprint"] != fingerprint or TRANSIENT_FAULTS & preparation["rejected"].keys():
        return False
    paths = {folder / shard["filename"]: shard["num_bytes"] for shard in preparation["shards"]}
    if preparation["hygiene"]["validation_fraction"]:
        held_out = read_preparation(folder / VALIDATION_FOLDER)
        if held_out is None:
            return False
        paths |= {folder / VALIDATION_FOLDER / shard["filename"]: shard["num_bytes"] for shard in held_out["shards"]}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _told_if_done(shard: Path, hygiene: HygieneSettings, pieces: Pieces | None) -> list[dict] | None:
    """The rejected files of a unit whose images a former run left, whole and with no fault that may be gone by now."""
    if pieces is not None:
        rejected = pieces.rejected(shard) if pieces.is_whole(shard, hygiene.sides) else None
    else:
        found = [read_shard(side_path(shard, side)) for side in hygiene.sides]
        rejected = found[TRAIN][0]["rejected"] if all(found) else None
    return None if TRANSIENT_FAULTS & {line["fault"] for line in rejected or ()} else rejected


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
