"""What a run finds in its output folder: nothing, a run to go on with, or one that must not be overwritten."""

import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from trainkit.errors import UserError
from trainkit.options.data import AugmentationOptions, ImageOptions
from trainkit.options.model import ModelOptions, ObjectiveOptions
from trainkit.options.training import EmaOptions, OptimizationOptions
from trainkit.training import checkpoint as checkpoints
from trainkit.training.metrics import truncate_metrics

# What a run learns depends on these rooms and options; the rest may differ between its parts.
ROOMS = (ImageOptions, AugmentationOptions, ModelOptions, ObjectiveOptions, OptimizationOptions, EmaOptions)
BOUND = {field.name for room in ROOMS for field in fields(room)} | {"seed", "mixed_precision", "shuffle_block_size"}
# The global batch is kept by itself.
FREE = {"train_batch_size", "gradient_accumulation_steps", "max_skipped_steps", "ema_snapshot_steps"}


def check_output_dir(options) -> None:
    """Refuse what `claim_output_dir` and `whole_checkpoints` would, before any image is prepared.

    Leaves nothing behind. Raises `UserError`.
    """
    output_dir = Path(options.output_dir)
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(_unwritable(output_dir, error)) from None
    if options.resume_from_checkpoint not in (None, "latest"):
        checkpoints.named_checkpoint(output_dir, options.resume_from_checkpoint)
    problem = _earlier_run(options, output_dir)
    if problem:
        raise UserError(problem)


def claim_output_dir(options, accelerator: Accelerator) -> None:
    """Create `--output_dir`, or make sure that it may be written; an earlier run's checkpoints are not lost silently.

    Raises `UserError` on all ranks.
    """
    output_dir, problem = Path(options.output_dir), None
    if accelerator.is_main_process:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            (output_dir / ".write_test").touch()
            (output_dir / ".write_test").unlink()
            checkpoints.remove_leftovers(output_dir)
            problem = _earlier_run(options, output_dir)
            if problem is None and options.resume_from_checkpoint is None:
                for folder in checkpoints.checkpoint_folders(output_dir):
                    shutil.rmtree(folder)
                truncate_metrics(output_dir, 0)
        except OSError as error:
            problem = _unwritable(output_dir, error)
    problem = broadcast_object_list([problem])[0]
    if problem:
        raise UserError(problem)


def _unwritable(output_dir: Path, error: OSError) -> str:
    return f"--output_dir {output_dir} cannot be written ({error.strerror}): choose another folder"


def _earlier_run(options, output_dir: Path) -> str | None:
    """What speaks against a new run in a folder that may hold another one's checkpoints."""
    if options.resume_from_checkpoint is not None or options.overwrite_output_dir:
        return None
    earlier = checkpoints.checkpoint_folders(output_dir)
    if not earlier:
        return None
    return (
        f"--output_dir {output_dir} holds {earlier[-1].name} of an earlier run: go on with "
        "--resume_from_checkpoint latest, or start again with --overwrite_output_dir (deletes its checkpoints)"
    )


def whole_checkpoints(options, accelerator: Accelerator) -> list[Path]:
    """The checkpoints to resume from, best first, the same on every rank; every byte was compared with its checksum.

    Empty for a new run. Raises `UserError` on all ranks where there are checkpoints and none is whole.
    """
    if options.resume_from_checkpoint is None:
        return []
    output_dir, whole, problem = Path(options.output_dir), [], None
    if accelerator.is_main_process:
        try:
            whole = _whole_checkpoints(output_dir, options.resume_from_checkpoint)
        except UserError as error:
            problem = str(error)
    whole, problem = broadcast_object_list([whole, problem])
    if problem:
        raise UserError(problem)
    return whole


def _whole_checkpoints(output_dir: Path, resume_from: str) -> list[Path]:
    """The newest whole checkpoint, and behind it those that have their sizes, in case it cannot be loaded."""
    candidates = checkpoints.resume_candidates(output_dir, resume_from)
    whole = []
    for folder in candidates:
        problem = checkpoints.damage(folder, checksums=not whole)
        if problem is None:
            whole.append(folder)
        else:
            print(f"WARNING: {folder} is damaged ({problem}); trying the one before", flush=True)
    if candidates and not whole:
        raise UserError(
            f"--resume_from_checkpoint latest: every checkpoint in {output_dir} is damaged; "
            "--overwrite_output_dir starts again"
        )
    if not whole:
        print(f"no checkpoint in {output_dir} yet: starting a new run", flush=True)
    return whole


def told_differences(there: dict, here: dict) -> str | None:
    """Options that were given otherwise when the checkpoint was made, in a few words; None where all are the same."""
    changed = [
        f"--{name} {there[name]} there, {value} now"
        for name, value in here.items()
        if name in BOUND - FREE and name in there and there[name] != value
    ]
    return "; ".join(changed) or None
