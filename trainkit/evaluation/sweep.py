"""Scores of a model at many (scheduler, steps): samples go from the pipeline to the extractor, and not to disk."""

# N images, B batch, D dimensions of a feature

import time
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from trainkit.evaluation.candidates import Candidates, Cell, facts_of
from trainkit.evaluation.features import ROUNDED_RESIZE, FeatureExtractor, extract_features
from trainkit.evaluation.frechet import RunningMoments
from trainkit.evaluation.images import ImageArray
from trainkit.evaluation.metrics import JACKKNIFE_GROUPS, frechet_distance_of_groups, scores
from trainkit.sampling.choice import calls_of
from trainkit.sampling.conditions import Conditions
from trainkit.sampling.generate import Pipeline, generate
from trainkit.sampling.load import is_stock_pipeline
from trainkit.sampling.schedulers import describe_scheduler, load_scheduler

PICTURE_IMAGES = 8  # per row of sampling_table.png
FEATURE_BATCH_SIZE = 64


class Sampled(NamedTuple):
    """What is kept of the samples of a cell: features (N, D) or sums of them, the first images, and the time."""

    features: Tensor | None
    groups: list[RunningMoments]
    first: np.ndarray
    seconds: float


def sample_features(
    accelerator: Accelerator,
    pipeline: Pipeline,
    extractor: FeatureExtractor,
    seeds: range,
    steps: int,
    batch_size: int,
    conditions: Conditions | None,
    guidance_scale: float | None,
    keep_features: bool,
) -> Sampled:
    """Sample one image per seed, each process its share, and extract their features. A collective.

    Without `keep_features` only sums of the features are kept, in `JACKKNIFE_GROUPS` groups. `guidance_scale` replaces
    that of `conditions`. `seconds` is the time of sampling alone, of the slowest process. `first` are the first
    `PICTURE_IMAGES` images.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    share = range(rank, len(seeds), world)
    own = None if conditions is None else conditions.for_images(share)
    guidance = {} if conditions is None else dict(conditions.guidance)
    if conditions is not None and guidance_scale is not None:
        guidance["guidance_scale"] = guidance_scale
    groups = [RunningMoments(extractor.num_features) for _ in range(0 if keep_features else JACKKNIFE_GROUPS)]
    features: list[Tensor] = []
    first: dict[int, np.ndarray] = {}
    seconds, done = 0.0, 0
    with torch.inference_mode(), accelerator.autocast():
        batches = generate(pipeline, [seeds[number] for number in share], steps, batch_size, own, **guidance)
        while True:
            started = time.perf_counter()
            images = next(batches, None)
            seconds += time.perf_counter() - started
            if images is None:
                break
            numbers = share[done : done + len(images)]
            done += len(images)
            first |= {number: image for number, image in zip(numbers, images, strict=True) if number < PICTURE_IMAGES}
            with torch.autocast(accelerator.device.type, enabled=False):
                found = _features(extractor, images, accelerator.device)
            if keep_features:
                features.append(found)
            for group in range(len(groups)):
                groups[group].add(found[[number % JACKKNIFE_GROUPS == group for number in numbers]])
    return _gathered(accelerator, extractor, features, groups, first, seconds, share)


def _features(extractor: FeatureExtractor, images: np.ndarray, device: torch.device) -> Tensor:
    """The features (B, D) of images (B, H, W, C) uint8."""
    rounded = extractor.resize == ROUNDED_RESIZE
    batches = ImageArray(images).batches(np.arange(len(images)), FEATURE_BATCH_SIZE, extractor.input_size, rounded)
    return extract_features(extractor, batches, device)


def _gathered(accelerator, extractor, features, groups, first, seconds, share) -> Sampled:
    """What all processes have sampled, in the order of the images."""
    own = torch.cat([torch.empty(0, extractor.num_features), *features])
    parts = gather_object([(own, first, seconds, list(share) if features else [])])
    for group in groups:
        group.sums = accelerator.reduce(group.sums.to(accelerator.device), "sum").cpu()
    pictures = {number: image for part in parts for number, image in part[1].items()}
    kept = None
    if not groups:
        kept = torch.cat([part[0] for part in parts])[np.argsort(np.concatenate([part[3] for part in parts]))]
    return Sampled(kept, groups, np.stack([pictures[number] for number in sorted(pictures)]), max(p[2] for p in parts))


def measure(sampled: Sampled, reference: Tensor, metrics: list[str], seed: int) -> dict[str, float]:
    """The scores of a cell against features (N, D) of the reference."""
    if sampled.features is None:
        return frechet_distance_of_groups(reference, sampled.groups)
    return scores(reference, sampled.features, metrics, seed)


def needs_features(metrics: list[str], num_images: int, num_features: int) -> bool:
    """Whether the features must be kept: FID needs only their sums, but those are the larger for few images."""
    return set(metrics) != {"fid"} or num_images <= num_features


def describe_cell(cell: Cell, candidates: Candidates, num_images: int, seconds: float, values: dict) -> dict:
    """The row of a cell in sampling_table.json."""
    folder, name = candidates.open(cell)
    scheduler = load_scheduler(folder, name)
    return {
        "scheduler": cell.scheduler,
        "steps": cell.steps,
        "calls": calls_of(scheduler, cell.steps),
        **facts_of(cell, is_stock_pipeline(folder)),
        "scores": values,
        "seconds_per_1000_images": round(1000 * seconds / num_images, 3),
        "config": describe_scheduler(scheduler),
    }
