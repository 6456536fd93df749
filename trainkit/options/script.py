"""The options that every training script accepts."""

import os
from dataclasses import dataclass
from typing import TypeVar

from trainkit.options.data import AugmentationOptions, ImageOptions, LoadingOptions, PairOptions, SourceOptions
from trainkit.options.model import (
    ConditioningOptions,
    ImageConditionOptions,
    LatentOptions,
    ModelOptions,
    ObjectiveOptions,
    TextOptions,
)
from trainkit.options.parsing import parse_options
from trainkit.options.training import RunOptions

T = TypeVar("T", bound="TrainingOptions")
DEFAULT_OPTIMIZER, DEFAULT_LEARNING_RATE = "muon", 2e-3


@dataclass
class TrainingOptions(
    SourceOptions,
    ImageOptions,
    LoadingOptions,
    AugmentationOptions,
    ModelOptions,
    LatentOptions,
    ObjectiveOptions,
    RunOptions,
):
    """The options of every training script."""

    def __post_init__(self):
        """Fill in the optimizer and its rate where they were not given."""
        self.optimizer = self.optimizer or DEFAULT_OPTIMIZER
        self.learning_rate = DEFAULT_LEARNING_RATE if self.learning_rate is None else self.learning_rate


@dataclass
class ConditionalTrainingOptions(
    TrainingOptions, ConditioningOptions, ImageConditionOptions, PairOptions, TextOptions
):
    """The options of train_conditional.py."""


def parse_training_options(options_class: type[T], description: str) -> T:
    """Parse the options of a training script from the command line. Raises `UserError` for an invalid value."""
    options = parse_options(options_class, description)
    if options.local_rank != -1:  # old launchers pass the rank as a flag
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    return options
