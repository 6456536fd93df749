"""How a training script begins: its options, what is refused before anything is prepared, its processes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainkit.config import parse_options
from trainkit.errors import UserError
from trainkit.options.data import AugmentationOptions, ImageOptions, LoadingOptions, SourceOptions
from trainkit.options.model import ModelOptions, ObjectiveOptions
from trainkit.options.training import (
    CheckpointOptions,
    EmaOptions,
    HardwareOptions,
    HubOptions,
    LoggingOptions,
    OptimizationOptions,
    ValidationOptions,
)

T = TypeVar("T", bound="TrainingOptions")
AT_LEAST_ONE = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "eval_batch_size",
    "logging_steps",
    "ddpm_num_steps",
    "max_skipped_steps",
)


@dataclass
class TrainingOptions(
    SourceOptions,
    ImageOptions,
    LoadingOptions,
    AugmentationOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizationOptions,
    EmaOptions,
    HardwareOptions,
    CheckpointOptions,
    LoggingOptions,
    ValidationOptions,
    HubOptions,
):
    """What every training script can be told."""


def parse_training_options(options_class: type[T], description: str) -> T:
    """The options of a training script from its command line. Raises `UserError` for a number that cannot be."""
    options = parse_options(options_class, description)
    if options.local_rank != -1:  # launchers of old pass the rank as a flag
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    for name in AT_LEAST_ONE:
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be at least 1")
    if options.shuffle_block_size < 0:
        raise UserError(f"--shuffle_block_size {options.shuffle_block_size} must be 0 (all images) or more")
    return options


def check_before_preparation(options: TrainingOptions) -> None:
    """Raise `UserError` for what cannot work, while it costs nothing yet."""
    from trainkit.data.loading.augment import check_augmentation
    from trainkit.diffusion.noise_schedule import DEFAULT_BETA_SCHEDULE, DEFAULT_PREDICTION_TYPE
    from trainkit.diffusion.objective import check_objective, take_prediction_type
    from trainkit.diffusion.pretrained import check_pretrained
    from trainkit.diffusion.unet import check_unet_options
    from trainkit.training.learning_rate import check_learning_rate_search
    from trainkit.training.optimization import check_optimization
    from trainkit.training.power_ema import check_power_lengths
    from trainkit.training.resume import check_output_dir
    from trainkit.training.score import check_score
    from trainkit.training.trackers import check_tracker

    check_tracker(options.logger)
    check_score(options)
    check_unet_options(options)
    check_pretrained(options)  # decides on what is predicted and the noise schedule, which the rest is checked with
    take_prediction_type(options, DEFAULT_PREDICTION_TYPE)
    check_objective(options)
    check_optimization(options)
    check_power_lengths(options)
    check_learning_rate_search(options)
    check_augmentation(options, grey=options.image_mode == "L")
    if options.ddpm_beta_schedule is None and options.prediction_type != "flow_prediction":
        options.ddpm_beta_schedule = DEFAULT_BETA_SCHEDULE  # by name in the log and on the model card
    check_output_dir(options)


def start_accelerator(options: TrainingOptions):
    """The run's `Accelerator`, with device, algorithms and random seeds set as the options say."""
    from accelerate.utils import set_seed

    from trainkit.training import launch
    from trainkit.training.speed import prepare_device

    prepare_device(options)
    if options.deterministic:
        launch.make_deterministic()
    launch.shard_as_launched(options)
    accelerator = launch.start_accelerator(
        options.mixed_precision,
        options.cpu_threads,
        log_with=None if options.logger == "none" else options.logger,
        project_dir=Path(options.output_dir) / options.logging_dir,
    )
    set_seed(options.seed)
    return accelerator
