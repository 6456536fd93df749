#!/usr/bin/env python
"""A pipeline whose weights are an average of any length, from the snapshots of a training run.

    # while training: two averages are tracked, and written down every 1000 steps
    accelerate launch train_unconditional.py ... --ema_power_lengths 0.05 0.1 --ema_snapshot_steps 1000

    # afterwards
    python reconstruct_ema.py --model_dir ddpm-model-64 --sigma_rel 0.08 --output_dir ddpm-model-64-008
    python reconstruct_ema.py --model_dir ddpm-model-64 --sigma_rel auto --reference photos-held-out \\
        --output_dir ddpm-model-64-best

sigma_rel is the length of the average as a part of the training (Karras et al. 2024, section 3). `auto` makes samples
at several lengths from the same seeds, scores them by KID against --reference, and saves the best.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from trainkit.errors import UserError, renamed_flags, run_script
from trainkit.options.fields import option
from trainkit.options.parsing import parse_options
from trainkit.sampling.conditions import ConditionOptions

AUTO = "auto"


@dataclass
class AverageOptions:
    """average: of which run, how long"""

    model_dir: str | None = option(None, "--output_dir of a training run with --ema_power_lengths")
    sigma_rel: str = option(AUTO, "relative length, more than 0 and at most 0.288; auto: the best of --lengths")
    step: int | None = option(
        None, "optimizer step to average up to, one with a snapshot; default: the last", within="[1, inf)"
    )
    output_dir: str | None = option(None, "new folder for the pipeline and reconstruction.json")


@dataclass
class ScoreOptions:
    """score: with --sigma_rel auto"""

    reference: str | None = option(None, "folder of real images, or a prepared dataset: better not trained on")
    lengths: list[float] | None = option(
        None, "sigma_rel to try; default: at most 8 over all that the snapshots give", nargs="+", within="(0, inf)"
    )
    num_images: int = option(200, "samples at each length", within="[1, inf)")
    scheduler: str | None = option(None, "name under schedulers/ to sample with; default: the pipeline's own")
    num_inference_steps: int = option(20, "scheduler steps: calls of the UNet per image", within="[1, inf)")
    seed: int = option(0, "seed of the first sample at each length; image i has seed + i", within="[0, inf)")
    sample_batch_size: int = option(16, "images per process and batch; does not change the images", within="[1, inf)")
    cpu_threads: int = option(0, "threads to compute with on a CPU; 0: as many as there are cores", within="[0, inf)")


@dataclass
class Options(AverageOptions, ScoreOptions, ConditionOptions):
    """The options of reconstruct_ema.py."""


def reconstruct(options: Options) -> None:
    from trainkit.sampling.load import find_pipeline
    from trainkit.training.averages.post_hoc import Snapshots, save_reconstruction

    model_dir, output_dir = Path(options.model_dir), Path(options.output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"--output_dir {output_dir} is there already: give a new folder")
    if not model_dir.is_dir():
        raise UserError(f"--model_dir {model_dir} is not a folder: give the --output_dir of a training run")
    snapshots = Snapshots(model_dir, options.step)
    record = {}
    with renamed_flags(model_name_or_path="model_dir"):
        find_pipeline(str(model_dir))
        if options.sigma_rel == AUTO:
            sigma_rel, record = best_length(options, snapshots)
        else:
            sigma_rel = float(options.sigma_rel)
    record = save_reconstruction(snapshots, sigma_rel, output_dir, record)
    print(
        f"{output_dir}: the average of sigma_rel {sigma_rel:g} at step {snapshots.step}, from {len(snapshots.files)} "
        f"snapshots, which miss {record['profile_missing']:.2%} of its profile"
    )


def best_length(options: Options, snapshots) -> tuple[float, dict]:
    """The length whose samples score best, and the record of all: a line each is printed."""
    import numpy as np
    import torch

    from trainkit.diffusion.frozen import local_device
    from trainkit.evaluation.features import EfficientNetLite0, extract_features
    from trainkit.evaluation.images import ImageArray, open_images
    from trainkit.evaluation.metrics import kernel_distance
    from trainkit.evaluation.report import comparability
    from trainkit.training.launch import set_cpu_threads
    from trainkit.training.score import FEATURE_BATCH_SIZE, MINIMUM_IMAGES, REFERENCE_IMAGES

    set_cpu_threads(options.cpu_threads)
    device = local_device()
    lengths = candidates(options, snapshots)
    sums = [snapshots.coefficients(length)[0] for length in lengths]  # refuses before the first is sampled
    extractor = EfficientNetLite0()

    def features_of(images, indices) -> torch.Tensor:
        return extract_features(extractor, images.batches(indices, FEATURE_BATCH_SIZE, extractor.input_size), device)

    real = open_images(options.reference, "--reference", skip_unreadable=True)
    count = min(len(real), max(REFERENCE_IMAGES, options.num_images))
    sampler = Sampler(options, snapshots.folder, device)
    reference = features_of(real, np.sort(np.random.default_rng(options.seed).permutation(len(real))[:count]))
    if len(reference) < MINIMUM_IMAGES:
        raise UserError(f"--reference {options.reference}: give at least {MINIMUM_IMAGES} images that can be read")

    rows = []
    print("sigma_rel       KID       std", flush=True)
    for length, coefficients in zip(lengths, sums, strict=True):
        samples = sampler.samples(snapshots, coefficients)
        found = kernel_distance(reference, features_of(ImageArray(samples), np.arange(len(samples))), options.seed)
        rows.append({"sigma_rel": length} | found)
        print(f"{length:9.3g} {found['kid']:9.4g} {found['kid_std']:9.2g}", flush=True)
    best = min(rows, key=lambda row: row["kid"])
    print(
        f"{options.num_images} samples at each length, {len(reference)} reference images | "
        f"{options.num_inference_steps} steps | {extractor.name} | "
        f"{comparability(extractor.weights_sha256, options.num_images, len(reference))}; "
        "differences within std mean nothing"
    )
    if len(lengths) > 2 and best["sigma_rel"] in (lengths[0], lengths[-1]):
        print(f"the best, {best['sigma_rel']:g}, is at the end of the lengths tried: a better one may lie beyond it")
    names = ("reference", "num_images", "num_inference_steps", "scheduler", "seed", "guidance_scale")
    settings = {name: getattr(options, name) for name in names}
    return best["sigma_rel"], {
        "scores": rows, "num_reference": len(reference), "feature_extractor": extractor.name, **settings,
    }  # fmt: skip


def candidates(options: Options, snapshots) -> list[float]:
    """The lengths to try, ascending."""
    if options.lengths is not None:
        return sorted(set(options.lengths))
    given = snapshots.reachable()
    chosen = {given[round(number * (len(given) - 1) / 7)] for number in range(8)}
    return sorted(chosen)


class Sampler:
    """The run's pipeline, which samples with one sum of snapshots after another."""

    def __init__(self, options: Options, folder: Path, device):
        from trainkit.sampling.conditions import read_conditions
        from trainkit.sampling.load import load_pipeline
        from trainkit.sampling.schedulers import check_steps, load_scheduler

        self.options = options
        scheduler = load_scheduler(folder, options.scheduler)
        check_steps(scheduler, options.num_inference_steps)
        self.pipeline = load_pipeline(folder, scheduler).to(device)
        self.conditions = read_conditions(options, self.pipeline)

    def samples(self, snapshots, coefficients):
        """Images (N, H, W, C) uint8, N `--num_images`."""
        import numpy as np
        import torch

        from trainkit.sampling.generate import generate

        for part in ("unet", "vector_embedding"):
            if getattr(self.pipeline, part, None) is not None:
                snapshots.load_into(getattr(self.pipeline, part), part, coefficients)
        options, numbers = self.options, range(self.options.num_images)
        seeds = [options.seed + number for number in numbers]
        conditions, guidance = None, {}
        if self.conditions is not None:
            conditions, guidance = self.conditions.for_images(numbers), self.conditions.guidance
        with torch.inference_mode():
            batches = generate(
                self.pipeline, seeds, options.num_inference_steps, options.sample_batch_size, conditions, **guidance
            )
            return np.concatenate(list(batches))


def check(options: Options) -> None:
    """Raise `UserError` for what cannot be, before anything is read."""
    for name, what in (("model_dir", "the --output_dir of a training run"), ("output_dir", "a new folder")):
        if getattr(options, name) is None:
            raise UserError(f"--{name} is missing: give {what}")
    for name, least in (("num_images", 4), ("num_inference_steps", 1), ("sample_batch_size", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)} must be at least {least}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("this script is one process: start it with `python`")
    if options.sigma_rel == AUTO:
        if options.reference is None:
            raise UserError("--reference is missing: --sigma_rel auto needs real images to score against")
        return
    try:
        float(options.sigma_rel)
    except ValueError:
        raise UserError(f"--sigma_rel {options.sigma_rel} must be a number such as 0.08, or auto") from None


def main() -> None:
    options = parse_options(Options, __doc__)
    check(options)
    reconstruct(options)


if __name__ == "__main__":
    run_script(main)
