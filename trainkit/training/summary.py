"""What a run says about itself at the start: a line per subject."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainkit.data.trial import num_images, trial_of
from trainkit.options.script import TrainingOptions
from trainkit.terminal import NAME_WIDTH, counted, say
from trainkit.training.checkpoints.resume import describe_dataset
from trainkit.training.run import Run
from trainkit.training.trackers import where_to_look


def print_summary(run: Run, options: TrainingOptions, resumed_from: Path | None) -> None:
    """Print what `run` will do with `options` (those of the user, also in a dry run), a line per subject."""
    for name, text in summary(run, options, resumed_from):
        say(f"{name:<{NAME_WIDTH}}{text}")


def summary(run: Run, options: TrainingOptions, resumed_from: Path | None) -> list[tuple[str, str]]:
    """The lines of the summary: a subject, and what is to be known about it."""
    output_dir = Path(options.output_dir)
    start = "new run" if resumed_from is None else f"resumed from {resumed_from.name}"
    lines = [
        ("data", _data(run)),
        ("model", _model(run)),
        ("length", _length(run)),
        ("batch", _batch(run)),
        ("objective", _objective(options)),
        ("optimizer", _optimizer(options)),
        ("device", _device(run)),
        ("output", f"{output_dir}, {start}"),
        ("saves", _saves(run, options)),
    ]
    measured = _measurements(options)
    return [*lines, *([("measures", measured)] if measured else []), ("tracker", where_to_look(options, output_dir))]


def count(number: float) -> str:
    """'12.3 k', '113.7 M': a large number in three digits or four."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:g}"


def _data(run: Run) -> str:
    images = run.images
    mode = "latents" if images.holds_latents else images.image_mode
    names = getattr(images, "label_names", None)
    classes = f", {len(names):,} classes" if names and run.condition is not None else ""
    trial = trial_of(images)
    where = "not prepared yet" if trial is not None and trial.seconds else images.folder
    return f"{num_images(images):,} images {images.height}x{images.width} {mode}{classes}, {where}"


def _model(run: Run) -> str:
    parameters = sum(p.numel() for p in run.unet.parameters())
    return f"{type(run.unet).__name__.removeprefix('FSDP')} of {count(parameters)} parameters, {run.throughput}"


def _length(run: Run) -> str:
    trained = run.max_train_steps * run.shape.global_size
    return (
        f"{counted(run.max_train_steps, 'step')} = {counted(trained, 'image')} = "
        f"{trained / num_images(run.images):.3g} epochs of {counted(num_images(run.images), 'image')}"
    )


def _batch(run: Run) -> str:
    shape, stage = run.shape, "ZeRO-3" if run.options.reshard_after_forward else "ZeRO-2"
    sharded = f"; weights sharded over the processes ({stage})" if run.sharded else ""
    return (
        f"{shape.global_size} images per step = {shape.per_device} per device x "
        f"{counted(shape.num_processes, 'process', 'es')} x {counted(shape.micro_steps, 'micro-step')}{sharded}"
    )


def _objective(options: TrainingOptions) -> str:
    schedule = f", noise schedule {options.ddpm_beta_schedule}" if options.ddpm_beta_schedule else ""
    return (
        f"predict {options.prediction_type}, loss weighting {options.loss_weighting or 'none'}{schedule}, "
        f"{options.ddpm_num_steps:,} timesteps"
    )


def _optimizer(options: TrainingOptions) -> str:
    average = "no average of the weights"
    if options.use_ema:
        average = f"EMA up to {options.ema_max_decay:g}"
        if options.ema_half_life_images is not None:
            average = f"EMA with a half-life of {options.ema_half_life_images:,} images"
    return (
        f"{options.optimizer}, learning rate {options.learning_rate:g}, {options.lr_scheduler}, "
        f"{options.lr_warmup_steps:,} warm-up steps, {average}"
    )


def _device(run: Run) -> str:
    threads = f", --cpu_threads {torch.get_num_threads()}" if run.accelerator.device.type == "cpu" else ""
    peak = f" with a peak of {run.throughput.peak_tflops:g} TFLOP/s" if run.throughput.peak_tflops else ""
    compiled = ", compiled" if run.unet._compiled_call_impl is not None else ""
    return f"{run.throughput.device_name}{peak}{threads}, mixed precision {run.accelerator.mixed_precision}{compiled}"


def _saves(run: Run, options: TrainingOptions) -> str:
    parts = {"checkpoint": _every(options.checkpointing_steps, "steps", "on a stop signal")}
    if options.checkpoints_total_limit is not None:
        parts["checkpoint"] += f" (the last {options.checkpoints_total_limit})"
    parts["pipeline"] = _every(options.save_model_epochs, "epochs", "at the end")
    parts["sample grid"] = _every(options.save_images_epochs, "epochs", "at the end")
    if options.preview_steps is not None:
        parts["sample grid"] = _every(options.preview_steps, "steps", "at the end")
    steps_per_epoch = num_images(run.images) / run.shape.global_size
    if any("epochs" in when for when in parts.values()):
        return f"{_joined(parts)}; an epoch is {steps_per_epoch:,.3g} steps"
    return _joined(parts)


def _measurements(options: TrainingOptions) -> str:
    parts = {}
    if options.validation_data_dir is not None or options.validation_split is not None:
        parts["held-out loss"] = _every(options.validation_steps, "steps", "at the end")
    if options.score_steps is not None:
        parts[f"KID of {options.score_images} samples"] = _every(options.score_steps, "steps", "at the end")
    return _joined(parts)


def _every(interval: int | None, unit: str, otherwise: str) -> str:
    return f"every {interval:,} {unit}" if interval else otherwise


def _joined(parts: dict[str, str]) -> str:
    return ", ".join(f"{name} {when}" for name, when in parts.items())


def reproducing(run: Run) -> tuple[Any, list[tuple[str, str]], int]:
    """What config.yaml says of `run`: its settings, with the precision of the launch; further facts; the step."""
    settings = run.settings
    if settings.mixed_precision in (None, "auto"):  # the launcher's, or the device's
        settings = replace(settings, mixed_precision=run.accelerator.mixed_precision)
    facts = [
        ("dataset", describe_dataset(run.images)),
        ("processes", f"{run.shape.num_processes} on {run.throughput.device_name}"),
        ("batch", _batch(run)),
    ]
    return settings, facts, run.step
