"""Resume a run: which checkpoint to load, whether it fits this run, and what has changed since."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

from safetensors import SafetensorError

from trainkit.data.loading.dataset import PreparedImages
from trainkit.errors import UserError, one_line
from trainkit.options.data import AugmentationOptions, ImageOptions
from trainkit.options.model import ModelOptions, ObjectiveOptions
from trainkit.options.script import TrainingOptions
from trainkit.options.training import EmaOptions, OptimizationOptions
from trainkit.processes import on_main_process
from trainkit.terminal import say, warn
from trainkit.training.checkpoints import folder as checkpoints
from trainkit.training.checkpoints.remote import HUB, fetch_checkpoint, is_remote
from trainkit.training.checkpoints.state import EMA, read_training_state
from trainkit.training.log import METRICS_FILE, truncate_metrics

# What a run learns depends on these groups and options. The others may differ between its parts.
GROUPS = (ImageOptions, AugmentationOptions, ModelOptions, ObjectiveOptions, OptimizationOptions, EmaOptions)
REPORTED = {field.name for group in GROUPS for field in fields(group)} | {
    "seed", "mixed_precision", "shuffle_block_size",
}  # fmt: skip
# The global batch size is kept separately.
NOT_REPORTED = {"train_batch_size", "gradient_accumulation_steps", "max_skipped_steps", "ema_snapshot_steps"}
ABANDONED = "abandoned"


def complete_checkpoints(options: TrainingOptions) -> list[Path]:
    """The checkpoints to resume from, best first, the same on every rank. Every byte of the first one is verified.

    Empty for a new run. Raises `UserError` on all ranks if there are checkpoints and all are damaged.
    """
    resume_from = options.resume_from_checkpoint
    if resume_from is None:
        return []
    output_dir = Path(options.output_dir)

    def find() -> list[Path]:
        return _complete_checkpoints(output_dir, fetch_checkpoint(options) if is_remote(resume_from) else resume_from)

    return on_main_process(find)


def _complete_checkpoints(output_dir: Path, resume_from: str) -> list[Path]:
    """The newest complete checkpoint, then those whose file sizes are right, in case it cannot be loaded."""
    candidates = checkpoints.resume_candidates(output_dir, resume_from)
    complete: list[Path] = []
    for folder in candidates:
        problem = checkpoints.damage(folder, checksums=not complete)
        if problem is None:
            complete.append(folder)
        else:
            warn(f"{folder} is damaged ({problem}); trying the previous one")
    if candidates and not complete:
        raise UserError(
            f"--resume_from_checkpoint latest: every checkpoint in {output_dir} is damaged; "
            "--overwrite_output_dir starts again"
        )
    if not complete:
        say(f"no checkpoint in {output_dir} yet: starting a new run")
    return complete


def check_resumable(options: TrainingOptions, images: PreparedImages, candidates: list[Path]) -> None:
    """Refuse to resume from the first of `candidates` with options or images that it does not fit.

    A mismatch is not damage: an older checkpoint would not fit either, and training it again would lose work. Call it
    on every rank; raises `UserError`.
    """
    if not candidates:
        return
    folder = candidates[0]
    saved = read_training_state(folder)
    had_ema = (folder / EMA).is_dir()
    if options.use_ema != had_ema:
        fix = "add --no_use_ema" if options.use_ema else "remove --no_use_ema"
        state = "an average" if had_ema else "no average"
        raise UserError(f"--resume_from_checkpoint {folder} holds {state} of the weights (EMA): {fix}")
    optimizer = saved["options"].get("optimizer", options.optimizer)
    if optimizer != options.optimizer:
        raise UserError(
            f"--optimizer {options.optimizer}: {folder} holds the state of {optimizer}; use --optimizer {optimizer}, "
            "or start a new run with --pretrained_model_name_or_path"
        )
    if saved["dataset"] != images.fingerprint and not options.allow_dataset_change:
        before = saved.get("dataset_description", "another dataset")
        raise UserError(
            f"--resume_from_checkpoint {folder} was trained on {before}, this run has {describe_dataset(images)}: use "
            "the same images, or continue on these with --allow_dataset_change"
        )


def describe_dataset(images: PreparedImages) -> str:
    """The dataset in a few words, for messages."""
    return f"{len(images):,} images of {images.preparation['source']['name']} ({images.fingerprint})"


def restore_first(candidates: list[Path], restore: Callable[[Path], dict]) -> tuple[Path | None, dict]:
    """Call `restore(folder)` for each of `candidates` until one can be read; (None, {}) for a new run.

    `restore` is a collective and returns training_state.json. Raises `UserError` if a checkpoint does not fit the run,
    or if none can be read.
    """
    for folder in candidates:
        try:
            return folder, restore(folder)
        except (OSError, SafetensorError, EOFError, json.JSONDecodeError) as error:
            reason, damaged = one_line(error), True
        except Exception as error:  # names, shapes or settings that differ
            reason, damaged = one_line(error), False
        if not damaged or folder == candidates[-1]:
            raise UserError(
                f"--resume_from_checkpoint {folder} does not fit this run or is damaged ({reason}): resume with the "
                "options in its training_state.json"
            )
        warn(f"{folder} cannot be loaded ({reason}); trying the previous one")
    return None, {}


def report_resume(
    options: TrainingOptions, images: PreparedImages, folder: Path, saved: dict, max_train_steps: int
) -> None:
    """Print what is resumed and what has changed, and move an abandoned branch aside. Main process only."""
    output_dir, step = Path(options.output_dir), saved["step"]
    say(f"resumed from {folder}: {step} of {max_train_steps} steps done")
    if options.resume_from_checkpoint not in ("latest", HUB):
        _set_aside(output_dir, step)
    truncate_metrics(output_dir, step)
    if saved["dataset"] != images.fingerprint:
        before = saved.get("dataset_description", "another dataset")
        warn(f"the dataset has changed: {before} before, {describe_dataset(images)} now")
    differences = format_differences(saved["options"], asdict(options))
    if differences:
        warn(f"these options differ from the checkpoint's and apply from here on: {differences}")
    if step >= max_train_steps:
        say(
            f"nothing left to train: {step} steps are done and the run has {max_train_steps}; for more, raise "
            "--max_train_steps (or --num_epochs, --max_train_images)"
        )


def _set_aside(output_dir: Path, step: int) -> None:
    """Move checkpoints after `step` to abandoned/: they belong to another line of training than the resumed one.

    Otherwise `latest` would return to them, and rotation would count them.
    """
    later = [path for path in checkpoints.checkpoint_folders(output_dir) if checkpoints.checkpoint_step(path) > step]
    if not later:
        return
    target = next(
        path for number in range(1, 10**6) if not (path := output_dir / ABANDONED / f"after-{step}-{number}").exists()
    )
    target.mkdir(parents=True)
    for path in later:
        path.rename(target / path.name)
    if (output_dir / METRICS_FILE).exists():
        shutil.copy2(output_dir / METRICS_FILE, target / METRICS_FILE)
    names = ", ".join(path.name for path in later)
    say(f"moved {names} to {target}: this run continues from step {step} and will write its own")


def format_differences(saved: dict, current: dict) -> str | None:
    """The options that differ between the checkpoint and this run; None if there are none."""
    changed = [
        f"--{name} {saved[name]} -> {value}"
        for name, value in current.items()
        if name in REPORTED - NOT_REPORTED and name in saved and saved[name] != value
    ]
    return "; ".join(changed) or None
