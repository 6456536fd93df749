#!/usr/bin/env python
"""KID and FID of generated images against real ones, with everything that a number needs beside it.

    python evaluate_samples.py --generated samples --reference path/to/images --output_file scores.json

The reference is a folder of images or a prepared dataset. Beside each score stands the noise floor: what two random
halves of the reference score against each other. Below 10,000 images read KID; FID is biased there.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from trainkit.config import option, parse_options
from trainkit.errors import UserError, run_script


@dataclass
class Options:
    """evaluation: which images, which metrics, where to"""

    generated: str | None = option(None, "folder of generated images, such as --output_dir of sample.py")
    reference: str | None = option(None, "folder of real images (searched recursively), or a prepared dataset")
    metrics: list[str] = option(["kid", "fid"], "metrics to compute", choices=("kid", "fid"), nargs="+")
    output_file: str | None = option(None, "JSON file for the scores; default: print them only")
    num_images: int | None = option(None, "images of each side at most, drawn at random by --seed; default: all")
    batch_size: int = option(64, "images through the feature extractor at once; does not change the scores")
    seed: int = option(0, "seed of the draws: --num_images, KID's subsets, the halves of the noise floor")


def evaluate(options: Options) -> dict:
    import numpy as np
    import torch
    from tqdm.auto import tqdm

    from trainkit.evaluation.features import INPUT_SIZE, EfficientNetLite0, extract_features
    from trainkit.evaluation.images import open_images, read_sampling_record
    from trainkit.evaluation.metrics import noise_floor, scores, why_not_comparable

    record = read_sampling_record(options.generated)
    sides = {
        "generated": open_images(options.generated, "--generated"),
        "reference": open_images(options.reference, "--reference"),
    }
    extractor = EfficientNetLite0()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features = {}
    for side, images in sides.items():
        count = min(len(images), options.num_images or len(images))
        if count < (2 if side == "generated" else 4):
            raise UserError(f"--{side}: {count} images are too few for a score; give at least 4")
        chosen = np.sort(np.random.default_rng(options.seed).permutation(len(images))[:count])
        batches = images.batches(chosen, options.batch_size, INPUT_SIZE)
        steps = -(-count // options.batch_size)
        features[side] = extract_features(extractor, tqdm(batches, total=steps, desc=f"{side} features"), device)

    num_generated, num_reference = len(features["generated"]), len(features["reference"])
    floor, floor_size = noise_floor(features["reference"], num_generated, options.metrics, options.seed)
    return {
        "scores": scores(features["reference"], features["generated"], options.metrics, options.seed),
        "noise_floor": floor,
        "num_generated": num_generated,
        "num_reference": num_reference,
        "num_noise_floor": floor_size,
        "note": why_not_comparable(min(num_generated, num_reference)),
        "feature_extractor": extractor.name,
        "generated": options.generated,
        "reference": options.reference,
        "sampling": record or None,
        "seed": options.seed,
    }


def print_scores(result: dict, metrics: list[str]) -> None:
    """A line for each score, with all that it depends on."""
    record = result["sampling"]
    sampler = "unknown sampler (no sampling.json)"
    if record is not None:
        sampler = f"{record['scheduler_name']} ({record['scheduler']['class']}), {record['num_inference_steps']} steps"
    for name in metrics:
        print(
            f"{name.upper()} {with_deviation(result['scores'], name)} | "
            f"noise floor {with_deviation(result['noise_floor'], name)} "
            f"({result['num_noise_floor']} real against {result['num_noise_floor']} real) | "
            f"{result['num_generated']} generated, {result['num_reference']} reference | {sampler} | "
            f"{result['feature_extractor']} | {result['note']}"
        )


def with_deviation(values: dict[str, float], name: str) -> str:
    deviation = values.get(f"{name}_std")
    return f"{values[name]:.4g}" + (f" +- {deviation:.2g}" if deviation is not None else "")


def main() -> None:
    options = parse_options(Options, __doc__)
    for name in ("generated", "reference"):
        if getattr(options, name) is None:
            raise UserError(f"--{name} is missing: give a folder of images")
    for name in ("num_images", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    result = evaluate(options)
    print_scores(result, options.metrics)
    if options.output_file is not None:
        file = Path(options.output_file)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".tmp-{file.name}")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(temporary, file)


if __name__ == "__main__":
    run_script(main)
