"""A score of samples while training goes on: KID of the averaged weights, by a small feature extractor.

Good for watching one run and for comparing runs of one data set; it is no published figure.
"""

from collections.abc import Callable

import numpy as np
import torch

from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.order import sample_indices
from trainkit.diffusion.noise_schedule import NoiseScheduler
from trainkit.errors import UserError
from trainkit.evaluation.features import INPUT_SIZE, EfficientNetLite0, extract_features
from trainkit.evaluation.images import ImageArray, PreparedFolder
from trainkit.sampling.generate import generate_over_processes
from trainkit.sampling.schedulers import DEFAULT_SCHEDULER, scheduler_bundle

MINIMUM_IMAGES, REFERENCE_IMAGES = 4, 1000
FEATURE_BATCH_SIZE = 64


def check_score(options) -> None:
    """Raise `UserError` before the long part starts where `--score_steps` could not be kept."""
    if options.score_steps is None:
        return
    for name, least in (("score_steps", 1), ("score_images", MINIMUM_IMAGES)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)} must be at least {least}")
    try:
        EfficientNetLite0()
    except UserError as error:
        raise UserError(f"--score_steps {options.score_steps}: {error}") from None


class SampleScore:
    """Measures KID of `--score_images` samples of the averaged weights, made by all processes.

    The reference is `held_out`, or the training images where that is None: at most `REFERENCE_IMAGES` of them (or
    `--score_images`, if that is more), the first in a fixed order, whose features are taken once. Make it, and call
    it, on every rank. `make_samples(unet, indices)` makes them, (N, H, W, C) uint8 on every rank, from the conditions
    of the training images `indices`; None: from no condition.
    """

    def __init__(
        self,
        run,
        held_out: PreparedImages | None,
        noise_scheduler: NoiseScheduler,
        make_samples: Callable[[torch.nn.Module, np.ndarray], np.ndarray] | None = None,
    ):
        self.run, options = run, run.options
        self.scheduler = scheduler_bundle(noise_scheduler)[DEFAULT_SCHEDULER]
        images, self.reference_name = (run.images, "training") if held_out is None else (held_out, "validation")
        if len(images) < MINIMUM_IMAGES:
            raise UserError(
                f"--score_steps {options.score_steps}: {len(images)} {self.reference_name} images are too few to "
                f"score against; give at least {MINIMUM_IMAGES}"
            )
        self.num_reference = min(len(images), max(REFERENCE_IMAGES, options.score_images))
        if run.accelerator.is_main_process:
            self.extractor = EfficientNetLite0()
            chosen = sample_indices(np.arange(self.num_reference), len(images), options.seed)
            self.reference = self._features(PreparedFolder(images.folder), chosen)
        self.make_samples = make_samples
        self._measured_step = run.log.last_step("kid")

    def measure(self) -> None:
        """Measure, write down and print the score of the current step, unless that was done already."""
        run = self.run
        if self._measured_step == run.step:
            return
        self._measured_step = run.step
        with run.averaged_weights() as unet:
            samples = self._samples(unet)
            if run.accelerator.is_main_process:
                self._tell(self._features(ImageArray(samples), np.arange(len(samples))))

    def _samples(self, unet: torch.nn.Module) -> np.ndarray:
        options, count = self.run.options, self.run.options.score_images
        if self.make_samples is not None:
            indices = np.arange(count) % len(self.run.images)
            return self.make_samples(unet, sample_indices(indices, len(self.run.images), options.seed))
        return generate_over_processes(
            self.run.accelerator,
            unet,
            self.scheduler,
            num_images=count,
            seed=options.seed,
            num_inference_steps=options.ddpm_num_inference_steps,
            batch_size=options.eval_batch_size,
        )

    def _features(self, images: ImageArray | PreparedFolder, indices: np.ndarray) -> torch.Tensor:
        batches = images.batches(indices, FEATURE_BATCH_SIZE, INPUT_SIZE)
        return extract_features(self.extractor, batches, self.run.accelerator.device)

    def _tell(self, features: torch.Tensor) -> None:
        from trainkit.evaluation.metrics import kernel_distance, why_not_comparable  # a second to import

        run, options = self.run, self.run.options
        distance = kernel_distance(self.reference, features, options.seed)
        run.log.values(
            run.step,
            distance
            | {
                "kid_n": options.score_images,
                "kid_reference_n": self.num_reference,
                "kid_reference": self.reference_name,
                "kid_num_inference_steps": options.ddpm_num_inference_steps,
            },
        )
        print(
            f"\nstep {run.step}: KID {distance['kid']:.4g} +- {distance['kid_std']:.2g} | {options.score_images} "
            f"generated, {self.num_reference} {self.reference_name} images | {DEFAULT_SCHEDULER} "
            f"({type(self.scheduler).__name__}), {options.ddpm_num_inference_steps} steps | {self.extractor.name} | "
            f"{why_not_comparable(min(options.score_images, self.num_reference))}",
            flush=True,
        )
