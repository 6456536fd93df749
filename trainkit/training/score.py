"""A score of samples during training: KID of the averaged weights, by default with a small feature extractor.

It is meant for watching a run and for comparing runs on one dataset. It is not comparable with published figures.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.order import sample_indices
from trainkit.errors import UserError
from trainkit.evaluation.features import ROUNDED_RESIZE, FeatureExtractor, extract_features, open_extractor
from trainkit.evaluation.images import ImageArray, PreparedFolder
from trainkit.options.script import TrainingOptions
from trainkit.processes import wait_for_everyone
from trainkit.terminal import say
from trainkit.training.run import Run

MINIMUM_IMAGES, REFERENCE_IMAGES = 4, 1000
FEATURE_BATCH_SIZE = 64


def check_score(options: TrainingOptions) -> None:
    """Raise `UserError` if `--score_steps` cannot work, before any image is prepared."""
    if options.score_steps is None:
        return
    for name, least in (("score_steps", 1), ("score_images", MINIMUM_IMAGES)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)} must be at least {least}")
    _open_extractor(options)


def _open_extractor(options: TrainingOptions) -> FeatureExtractor:
    try:
        return open_extractor(options.score_extractor, options.cache_dir, "--score_extractor")
    except UserError as error:
        raise UserError(f"--score_steps {options.score_steps}: {error}") from None


class SampleScore:
    """Measures the KID of `--score_images` samples of the averaged weights.

    The reference is `held_out`, or the training images if that is None: at most `REFERENCE_IMAGES` of them (or
    `--score_images`, if that is more), the first in a fixed order, whose features are computed once.
    `generate(count)` returns samples (count, H, W, C) uint8 on every rank and the name of their scheduler. Create and
    call it on every rank.
    """

    def __init__(self, run: Run, held_out: PreparedImages | None, generate: Callable[[int], tuple[np.ndarray, str]]):
        self.run, self.generate, options = run, generate, run.options
        images, self.reference_name = (run.images, "training") if held_out is None else (held_out, "validation")
        if len(images) < MINIMUM_IMAGES:
            raise UserError(
                f"--score_steps {options.score_steps}: {len(images)} {self.reference_name} images are too few to "
                f"score against; at least {MINIMUM_IMAGES} are needed"
            )
        self.num_reference = min(len(images), max(REFERENCE_IMAGES, options.score_images))
        if run.accelerator.is_main_process:
            self.extractor = _open_extractor(options)
            chosen = sample_indices(np.arange(self.num_reference), len(images), options.seed)
            self.reference = self._features(PreparedFolder(images.folder), chosen)
        wait_for_everyone()
        self._measured_step = run.log.last_step("kid")

    def measure(self) -> None:
        """Measure, log and print the score of the current step, unless that was done already."""
        run = self.run
        if self._measured_step == run.step:
            return
        self._measured_step = run.step
        samples, scheduler = self.generate(run.options.score_images)
        if run.accelerator.is_main_process:
            started = time.perf_counter()
            self._report(self._features(ImageArray(samples), np.arange(len(samples))), scheduler)
            run.log.pause(time.perf_counter() - started)
        wait_for_everyone()

    def _features(self, images: ImageArray | PreparedFolder, indices: np.ndarray) -> torch.Tensor:
        rounded = self.extractor.resize == ROUNDED_RESIZE
        batches = images.batches(indices, FEATURE_BATCH_SIZE, self.extractor.input_size, rounded)
        return extract_features(self.extractor, batches, self.run.accelerator.device)

    def _report(self, features: torch.Tensor, scheduler: str) -> None:
        from trainkit.evaluation.metrics import kernel_distance  # takes a second to import
        from trainkit.evaluation.report import comparability

        run, options = self.run, self.run.options
        distance = kernel_distance(self.reference, features, options.seed)
        run.log.write_values(
            run.step,
            distance
            | {
                "kid_n": options.score_images,
                "kid_reference_n": self.num_reference,
                "kid_reference": self.reference_name,
                "kid_scheduler": scheduler,
                "kid_num_inference_steps": options.ddpm_num_inference_steps,
            },
        )
        say(
            f"step {run.step}: KID {distance['kid']:.4g} +- {distance['kid_std']:.2g} | {options.score_images} "
            f"generated, {self.num_reference} {self.reference_name} images | {scheduler}, "
            f"{options.ddpm_num_inference_steps} steps | {self.extractor.name} | "
            f"{comparability(self.extractor.weights_sha256, options.score_images, self.num_reference)}"
        )
