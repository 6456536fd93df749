"""`--dry_run`: a few real steps in a temporary folder, and what the whole run would take.

Everything runs as in training, with the same code: data, condition, model, optimizer, averages, and the checkpoint to
resume from. Only the output folder is another, and nothing is sent to a tracker or to the Hub.
"""

import atexit
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from trainkit.data.preparation.pool import num_cores
from trainkit.data.trial import num_images, trial_of
from trainkit.errors import UserError
from trainkit.hub.options import check_hub_access
from trainkit.options.script import TrainingOptions
from trainkit.processes import on_main_process
from trainkit.terminal import NAME_WIDTH, counted, format_seconds, say, tell
from trainkit.training.checkpoints.resume import complete_checkpoints
from trainkit.training.learning_rate_finder import find_learning_rate
from trainkit.training.throughput import memory_peak_mib

WARM_UP_STEPS, TIMED_STEPS = 1, 4
FORWARD_SHARE = 1 / 3  # of the work of a training step


def trial_options(options: TrainingOptions, images: Any) -> TrainingOptions:
    """The options of the steps that a dry run takes: those of training, in a temporary folder."""
    candidates = complete_checkpoints(options)
    folder = tempfile.mkdtemp(prefix="trainkit-dry-run-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return replace(
        options,
        output_dir=folder,
        overwrite_output_dir=False,
        resume_from_checkpoint=str(candidates[0].resolve()) if candidates else None,
        allow_dataset_change=options.allow_dataset_change or trial_of(images) is not None,
        checkpointing_steps=0,
        logger="none",
        push_to_hub=False,
        dry_run=False,
    )


def print_plan(
    run: Any, options: TrainingOptions, loss_of: Callable[[Any, Any], torch.Tensor], total_steps: int | None = None
) -> None:
    """Take a few steps of `run`, print what the whole run with the user's `options` takes, and end the run.

    `total_steps` are those of all stages of a distillation. Raises `UserError` for what cannot work.
    """
    hub = on_main_process(lambda: check_hub_access(options)) if options.push_to_hub else None
    first, seconds = run.step, _time_steps(run, loss_of)
    remaining = (total_steps or run.max_train_steps) - first
    disk, problem = _disk(run, options)
    plan = [
        *_preparation(run, options),
        ("time", _time(run, options, seconds, remaining)),
        ("memory", _memory(run)),
        ("disk", disk),
        *([("Hub", hub)] if hub else []),
    ]
    for name, text in plan:
        say(f"{name:<{NAME_WIDTH}}{text}")
    run.close()
    shutil.rmtree(run.output_dir, ignore_errors=True)
    if problem is not None:
        raise UserError(problem)
    tell("--dry_run: all checks passed, nothing was trained; to train, run it again without the flag")


def only_measures(
    run: Any, options: TrainingOptions, loss_of: Callable[[Any, Any], torch.Tensor], total_steps: int | None = None
) -> bool:
    """Whether `--dry_run` or `--find_learning_rate` asks for a measurement in the place of training; then it is made.

    The arguments are those of `print_plan`.
    """
    if options.dry_run:
        print_plan(run, options, loss_of, total_steps)
    elif options.find_learning_rate:
        find_learning_rate(run, loss_of)
    return options.dry_run or options.find_learning_rate


def _time_steps(run: Any, loss_of: Callable[[Any, Any], torch.Tensor]) -> float:
    """Seconds per optimizer step, after `WARM_UP_STEPS` if the run has more.

    Raises `UserError` if a step does not fit into memory.
    """
    run.log.show_progress = False
    timed_from, started = run.step, time.perf_counter()
    warm = min(run.step + WARM_UP_STEPS, run.max_train_steps - 1)
    try:
        for batch in run.batches():
            run.update(loss_of(run.model, batch))
            if run.end_of_step and run.step == warm:
                _wait_for(run.accelerator.device)
                timed_from, started = run.step, time.perf_counter()
            if run.end_of_step and run.step == warm + TIMED_STEPS:
                break
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not should_reduce_batch_size(error):
            raise
        raise UserError(
            f"--train_batch_size {run.shape.per_device}: a micro-step does not fit into the memory of the device; use "
            "--find_batch_size, --gradient_checkpointing, or a smaller one with more --gradient_accumulation_steps"
        ) from None
    _wait_for(run.accelerator.device)
    return (time.perf_counter() - started) / max(1, run.step - timed_from)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def _preparation(run: Any, options: TrainingOptions) -> list[tuple[str, str]]:
    trial = trial_of(run.images)
    if trial is None:
        return []
    if not trial.seconds:
        return [("encoding", f"{len(trial)} of {trial.num_files:,} images were encoded; the start encodes the others")]
    num_read = sum(trial.preparation["rejected"].values()) + len(trial)
    processes = options.num_proc or num_cores()
    seconds = trial.seconds / num_read * trial.num_files / processes
    rejected = ", ".join(f"{count} {fault}" for fault, count in trial.preparation["rejected"].items())
    return [
        (
            "preparing",
            f"{trial.num_files:,} files, once: about {format_seconds(seconds)} on "
            f"{counted(processes, 'process', 'es')}, from {num_read} of them{f' ({rejected})' if rejected else ''}",
        )
    ]


def _time(run: Any, options: TrainingOptions, seconds: float, remaining: int) -> str:
    """The time of training, and that of the sample grids, whose forward passes are a third of the work of a step."""
    epochs = remaining * run.shape.global_size / num_images(run.images)
    grids = 1 + int(epochs / options.save_images_epochs if options.save_images_epochs else 0)
    if options.preview_steps is not None:
        grids = 1 + remaining // options.preview_steps
    passes = grids * options.eval_batch_size * options.ddpm_num_inference_steps
    grid_seconds = passes * seconds * FORWARD_SHARE / run.shape.global_size
    return (
        f"{format_seconds(seconds * remaining)} for {counted(remaining, 'step')} at {seconds:.3g} s "
        f"({run.shape.global_size / seconds:.3g} images/s), and about {format_seconds(grid_seconds)} for "
        f"{counted(grids, 'sample grid')}; held-out losses, scores and saves come on top"
    )


def _memory(run: Any) -> str:
    device = run.accelerator.device
    weights, averages, state = (size / 2**20 for size in _sizes(run))
    peak = f"{memory_peak_mib(device):,.0f} MiB at most per process"
    if device.type == "cuda":
        peak += f" of {torch.cuda.get_device_properties(device).total_memory / 2**20:,.0f}"
    return (
        f"{peak}: weights {weights:,.1f}, gradients {weights:,.1f}, optimizer {state:,.1f}, averages {averages:,.1f}, "
        "the rest activations and libraries"
    )


def _sizes(run: Any) -> tuple[int, int, int]:
    """Bytes on this process of the weights, their averages and the optimizer's state."""
    weights = sum(p.numel() * p.element_size() for p in run.unet.parameters())
    state = sum(
        value.numel() * value.element_size()
        for values in run.optimizer.optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    )
    return weights, len(run.averages) * sum(4 * p.numel() for p in run.unet.parameters()), state


def _disk(run: Any, options: TrainingOptions) -> tuple[str, str | None]:
    """What the output folder will hold at most, and what to change if the disk has no room for it."""
    weights, averages, state = _sizes(run)
    each, interval = weights + averages + state, options.checkpointing_steps
    count = -(-run.max_train_steps // interval) if interval else 1
    if options.checkpoints_total_limit is not None:
        count = min(count, options.checkpoints_total_limit + 1)  # the oldest is deleted after the newest is whole
    output_dir = Path(options.output_dir)
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, count * each + 2 * weights
    text = (
        f"{counted(count, 'checkpoint')} of {_megabytes(each)} and a pipeline of {_megabytes(weights)}: "
        f"{_megabytes(needed)}; {_megabytes(free)} free at {existing}"
    )
    if needed <= free:
        return text, None
    fits = max(1, int((free - 2 * weights) // max(1, each)) - 1)
    return text, (
        f"--output_dir {output_dir}: {counted(count, 'checkpoint')} take {_megabytes(needed)}, {_megabytes(free)} are "
        f"free: use --checkpoints_total_limit {fits}, a larger --checkpointing_steps, or another disk"
    )


def _megabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
