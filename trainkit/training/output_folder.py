"""The output folder of a run: what may be written there, and the lock that keeps other runs out.

    OUTPUT/.trainkit/run.json    marks the folder as one that a run created or was allowed to use
    OUTPUT/.trainkit/lock        held while a run writes; lock.json names its host, process and start

A run only writes under the names in `RUN_FILES`. A new run refuses a folder in which these names already belong to
something else, so that in a marked folder every file under these names is the run's own.
"""

import shutil
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from trainkit import __version__
from trainkit.atomic import write_json
from trainkit.data.files import location
from trainkit.data.preparation.output import is_among_images
from trainkit.errors import UserError
from trainkit.locking import holder_of, write_holder
from trainkit.options.script import TrainingOptions
from trainkit.report.record import RECORD_NAME
from trainkit.report.write import REPORT_NAME
from trainkit.sampling.pipeline import PIPELINE_PARTS
from trainkit.terminal import say
from trainkit.training.checkpoints import folder as checkpoints
from trainkit.training.checkpoints.remote import is_remote
from trainkit.training.config_file import CONFIG_NAME
from trainkit.training.log import METRICS_FILE

MARKER_FOLDER, MARKER = ".trainkit", "run.json"
RUN_FILES = (
    *PIPELINE_PARTS, "samples", "loss.png", METRICS_FILE, "skipped_steps.jsonl", "ema_snapshots", "learning_rate.json",
    "learning_rate.png", "stages", "distillation.json", CONFIG_NAME, REPORT_NAME, RECORD_NAME,
)  # fmt: skip
LOCK_WAIT_S = 20.0  # a stopped run may need this long to write its last checkpoint
NAMED_FILES = 5


def check_output_dir(options: TrainingOptions) -> None:
    """Refuse an unusable `--output_dir` before any image is prepared, without creating it. Raises `UserError`."""
    output_dir = Path(options.output_dir)
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(_unwritable(output_dir, error)) from None
    _refuse_output_among_images(options)
    if (resume_from := options.resume_from_checkpoint) not in (None, "latest") and not is_remote(resume_from):
        checkpoints.named_checkpoint(output_dir, resume_from)
    problem = _conflict(options, output_dir)
    if problem:
        raise UserError(problem)


def claim_output_dir(options: TrainingOptions) -> FileLock:
    """Create and lock `--output_dir`, and back up what a new run replaces. Call it on the main process only.

    Returns the lock, which the run holds until it ends. Raises `UserError` if another run holds it, or if the folder
    holds files that this run must not replace.
    """
    output_dir = Path(options.output_dir)
    try:
        (output_dir / MARKER_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = _acquire(output_dir)
        checkpoints.remove_leftovers(output_dir)
        problem = _conflict(options, output_dir)
        if problem:
            raise UserError(problem)
        if options.overwrite_output_dir and options.resume_from_checkpoint is None:
            _start_again(output_dir)
        write_json(output_dir / MARKER_FOLDER / MARKER, {"trainkit": __version__})
    except OSError as error:
        raise UserError(_unwritable(output_dir, error)) from None
    return lock


def _acquire(output_dir: Path) -> FileLock:
    lock, info = FileLock(output_dir / MARKER_FOLDER / "lock"), output_dir / MARKER_FOLDER / "lock.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"--output_dir {output_dir} is in use by {holder_of(info)}: waiting for it to end")
        try:
            lock.acquire(timeout=LOCK_WAIT_S)
        except Timeout:
            raise UserError(
                f"--output_dir {output_dir} is in use by {holder_of(info)}: wait until that run ends, stop it, or "
                "choose another folder"
            ) from None
    write_holder(info)
    return lock


def _conflict(options: TrainingOptions, output_dir: Path) -> str | None:
    """Why this run must not write into the folder, in one line; None if it may."""
    if options.overwrite_output_dir:
        return None
    earlier = checkpoints.checkpoint_folders(output_dir)
    if earlier:
        if options.resume_from_checkpoint is not None:
            return None
        return (
            f"--output_dir {output_dir} holds {earlier[-1].name} of an earlier run: continue it with "
            "--resume_from_checkpoint latest, or start again with --overwrite_output_dir (deletes its checkpoints)"
        )
    present = [name for name in RUN_FILES if (output_dir / name).exists()]
    if not present or options.find_learning_rate:
        return None
    names = ", ".join(present[:NAMED_FILES]) + (", ..." if len(present) > NAMED_FILES else "")
    if (output_dir / MARKER_FOLDER / MARKER).exists():
        unfinished = "model_index.json" not in present
        return None if unfinished else (
            f"--output_dir {output_dir} holds the model of an earlier run and no checkpoint to resume: choose another "
            f"folder, or start again with --overwrite_output_dir (moves {names} to a backup folder)"
        )  # fmt: skip
    return (
        f"--output_dir {output_dir} holds files that no run of these scripts made ({names}): choose another folder, "
        "or add --overwrite_output_dir, which moves them to a backup folder first"
    )


def _start_again(output_dir: Path) -> None:
    """Delete the checkpoints of an earlier run, and move every other file that a run would replace to a backup."""
    for folder in checkpoints.checkpoint_folders(output_dir):
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    present = [name for name in RUN_FILES if (output_dir / name).exists()]
    if not present:
        return
    backup = next(path for number in range(1, 10**6) if not (path := output_dir / f"backup-{number}").exists())
    backup.mkdir()
    for name in present:
        (output_dir / name).rename(backup / name)
    say(f"moved {', '.join(present)} of {output_dir} to {backup}")


def _refuse_output_among_images(options: TrainingOptions) -> None:
    """Files of a run do not belong among the images; grids among raw ones would be trained on by the next run."""
    conditions = ("conditioning_data_dir", "validation_conditioning_data_dir")
    for flag in ("train_data_dir", "validation_data_dir", *conditions):
        given = getattr(options, flag, None)
        if given is None or (flag == "train_data_dir" and options.dataset_name is not None):
            continue
        if is_among_images(Path(options.output_dir), location(given, options.storage_options)):
            raise UserError(
                f"--output_dir {options.output_dir} is inside --{flag} {given}, where grids would become training "
                "images: choose a folder outside"
            )


def _unwritable(output_dir: Path, error: OSError) -> str:
    return f"--output_dir {output_dir} cannot be written ({error.strerror}): choose another folder"
