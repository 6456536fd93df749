"""The options that every training script accepts."""

import os
from dataclasses import dataclass
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
    """The options of every training script."""


def parse_training_options(options_class: type[T], description: str) -> T:
    """Parse the options of a training script from the command line. Raises `UserError` for an invalid value."""
    options = parse_options(options_class, description)
    if options.local_rank != -1:  # old launchers pass the rank as a flag
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    for name in AT_LEAST_ONE:
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be at least 1")
    if options.shuffle_block_size < 0:
        raise UserError(f"--shuffle_block_size {options.shuffle_block_size} must be 0 (all images) or more")
    return options
