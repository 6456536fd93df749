#!/usr/bin/env python
"""KID and FID of generated images against real ones, with everything that a number needs beside it.

    python evaluate_samples.py --generated samples --reference path/to/images --output_file scores.json

The reference is a folder of images or a prepared dataset. Beside each score stands the noise floor: what two random
halves of the reference score against each other. Below 10,000 images read KID; FID is biased there.

Samples of a conditional model (with the metadata.jsonl that sample.py writes) get scores a class, and how often they
show what they were asked for: the class by a classifier trained on real images, the caption by what images look like.

    python evaluate_samples.py --generated samples --reference photos --classifier_data_dir photos
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from trainkit.config import parse_options
from trainkit.errors import UserError, run_script
from trainkit.options.fields import option


@dataclass
class Options:
    """evaluation: which images, which metrics, where to"""

    generated: str | None = option(None, "folder of generated images, such as --output_dir of sample.py")
    reference: str | None = option(None, "folder of real images (searched recursively), or a prepared dataset")
    metrics: list[str] = option(["kid", "fid"], "metrics to compute", choices=("kid", "fid"), nargs="+")
    output_file: str | None = option(None, "JSON file for the scores; default: print them only")
    num_images: int | None = option(
        None, "images of each side at most, drawn at random by --seed; default: all", within="[1, inf)"
    )
    batch_size: int = option(
        64, "images per batch of the feature extractor; does not change the scores", within="[1, inf)"
    )
    seed: int = option(
        0, "seed of the draws: --num_images, KID's subsets, the halves of the noise floor", within="[0, inf)"
    )
    classifier_data_dir: str | None = option(
        None, "real images with classes, or a prepared dataset: a classifier of them says what the samples show"
    )
    retrieval_captions: int = option(
        10, "number of captions among which a sample's own is searched; chance is 1 / this", within="[2, inf)"
    )
    cache_dir: str | None = option(
        None, "folder for trained classifiers; default: $TRAINKIT_CACHE, else ~/.cache/trainkit"
    )


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
        "reference": open_images(options.reference, "--reference", skip_unreadable=True),
    }
    extractor = EfficientNetLite0()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features, scored = {}, {}
    for side, images in sides.items():
        count = min(len(images), options.num_images or len(images))
        _check_count(side, count)
        scored[side] = np.sort(np.random.default_rng(options.seed).permutation(len(images))[:count])
    accuracy = None
    if options.classifier_data_dir is not None:
        accuracy = judge_classes(options, sides["generated"], scored["generated"])
    for side, images in sides.items():
        batches = images.batches(scored[side], options.batch_size, INPUT_SIZE)
        steps = -(-len(scored[side]) // options.batch_size)
        features[side] = extract_features(extractor, tqdm(batches, total=steps, desc=f"{side} features"), device)
        scored[side] = [index for index in scored[side].tolist() if index not in images.unreadable]
        _check_count(side, len(scored[side]))

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
        "unreadable_reference": {
            str(sides["reference"].files[index]): why for index, why in sides["reference"].unreadable.items()
        },
        "accuracy": accuracy,
        **compare_conditions(options, sides, scored, features),
    }


def _check_count(side: str, count: int) -> None:
    least = 2 if side == "generated" else 4
    if count < least:
        raise UserError(f"--{side}: {count} images are too few for a score; give at least {least} that can be read")


def judge_classes(options: Options, images, indices) -> dict:
    """How many of the samples `indices` show the class asked for, by a classifier of `--classifier_data_dir`."""
    from trainkit.data.files import cache_root
    from trainkit.evaluation.classifier import classifier_of
    from trainkit.evaluation.conditioning import check_asked_labels, label_accuracy
    from trainkit.evaluation.conditions import read_shown
    from trainkit.evaluation.images import open_images

    flag = "--classifier_data_dir"
    real = open_images(options.classifier_data_dir, flag, skip_unreadable=True)
    asked, shown = read_shown(images, "--generated"), read_shown(real, flag)
    labels = [asked.labels[index] for index in indices]
    flag = f"{flag} {options.classifier_data_dir}"
    check_asked_labels(labels, shown.label_names, options.generated, flag)
    classifier = classifier_of(real, shown, flag, cache_root(options.cache_dir), options.seed)
    found = label_accuracy(labels, classifier.predict(images, indices), classifier)
    return found | {"trained_on": options.classifier_data_dir, "num_unreadable": len(real.unreadable)}


def compare_conditions(options: Options, sides: dict, scored: dict, features: dict) -> dict:
    """Scores a class, and captions found again, where both sides have classes or captions.

    `sides`, `scored` and `features` hold for generated and reference the images, the numbers of those that have
    features, and these.
    """
    from trainkit.evaluation.conditioning import caption_retrieval, scores_per_class
    from trainkit.evaluation.conditions import read_shown

    asked, found = read_shown(sides["generated"], "--generated"), {}
    if not (asked.has_labels or asked.has_texts):
        return found
    shown = read_shown(sides["reference"], "--reference")

    def of_both(name: str) -> tuple:
        real, made = ([getattr(side, name)[index] for index in scored[key]] for key, side in both)
        return features["reference"], real, features["generated"], made

    both = (("reference", shown), ("generated", asked))
    if asked.has_labels and shown.has_labels:
        found["per_class"] = scores_per_class(*of_both("labels"), options.metrics, options.seed)
    if asked.has_texts and shown.has_texts:
        found["retrieval"] = caption_retrieval(*of_both("texts"), options.retrieval_captions, options.seed)
    return found


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
    for name, why in list(result["unreadable_reference"].items())[:10]:
        print(f"--reference: {name} cannot be read ({why})")
    if result["unreadable_reference"]:
        print(f"--reference: left out {len(result['unreadable_reference'])} images that cannot be read")


def print_conditioning(result: dict, metrics: list[str]) -> None:
    """A line for each class and for each kind of condition, with the chance level and what the judge is worth."""
    for label, of_class in list((result.get("per_class") or {}).items())[:20]:
        told = ", ".join(
            f"{name.upper()} {with_deviation(of_class['scores'], name)} "
            f"(noise floor {with_deviation(of_class['noise_floor'], name)})"
            for name in metrics
        )
        print(
            f"class {label}: {told} | {of_class['num_generated']} generated, {of_class['num_reference']} reference | "
            f"{of_class['note']}"
        )
    if accuracy := result.get("accuracy"):
        print(
            f"ACCURACY {with_interval(accuracy)} of {accuracy['n']} samples show the class asked for | chance "
            f"{accuracy['chance']:.1%} | the classifier is right on {with_interval(accuracy['classifier'])} of "
            f"{accuracy['classifier']['n']} real images of {accuracy['trained_on']} that it was not trained on | "
            f"{accuracy['num_not_asked']} samples of no class left out"
        )
    if retrieval := result.get("retrieval"):
        print(
            f"RETRIEVAL {with_interval(retrieval)} of {retrieval['n']} samples are nearest to the real images of "
            f"their caption, among {retrieval['num_captions']} captions | chance {retrieval['chance']:.1%} | "
            f"{retrieval['num_not_judged']} samples whose caption no real image has left out"
        )


def with_interval(found: dict) -> str:
    low, high = found["interval"]
    return f"{found['share']:.1%} (95 % interval {low:.1%} to {high:.1%})"


def with_deviation(values: dict[str, float], name: str) -> str:
    deviation = values.get(f"{name}_std")
    return f"{values[name]:.4g}" + (f" +- {deviation:.2g}" if deviation is not None else "")


def main() -> None:
    options = parse_options(Options, __doc__)
    for name in ("generated", "reference"):
        if getattr(options, name) is None:
            raise UserError(f"--{name} is missing: give a folder of images")
    if options.output_file is not None and Path(options.output_file).is_dir():
        raise UserError(f"--output_file {options.output_file} is a folder: give the name of a JSON file")
    result = evaluate(options)
    print_scores(result, options.metrics)
    print_conditioning(result, options.metrics)
    if options.output_file is not None:
        file = Path(options.output_file)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".tmp-{file.name}")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(temporary, file)


if __name__ == "__main__":
    run_script(main)
