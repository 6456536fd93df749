#!/usr/bin/env python
"""Score generated images against real ones: FID, KID, precision/recall, density/coverage, memorization.

    python evaluate_samples.py --generated samples --reference path/to/images --output_file scores.json

    # the features of published FIDs
    python tools/fetch_weights.py inception
    python evaluate_samples.py --generated samples.npz --reference prepared --feature_extractor inception \\
        --metrics fid fid_infinity kid precision recall density coverage

`--generated` and `--reference` are folders of images, prepared datasets, or .npz files of uint8 (N, H, W, C). Each
score is printed with the noise floor: the score of two random halves of the reference against each other. Use KID for
fewer than 10,000 images, because FID is biased there; fid_infinity extrapolates FID to infinitely many samples.

Samples of a conditional model (with the metadata.jsonl of sample.py) get scores per class, and the share of samples
that show what was requested: the class by a classifier trained on real images, the caption by image features.

    python evaluate_samples.py --generated samples --reference photos --classifier_data_dir photos

`--held_out` adds a search for copies: the share of samples that are nearer to a reference image than 99 % of the
held-out images are. `accelerate launch evaluate_samples.py ...` splits the images over all processes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.atomic import write_json
from trainkit.errors import UserError, one_line, run_script
from trainkit.options.fields import option
from trainkit.options.parsing import parse_options

if TYPE_CHECKING:  # torch takes seconds to import, --help does not need it
    from trainkit.evaluation.features import FeatureExtractor
    from trainkit.evaluation.reference import ScoredImages

METRICS = ("kid", "fid", "fid_infinity", "precision", "recall", "density", "coverage")


@dataclass
class Options:
    """evaluation: images, metrics and output"""

    generated: str | None = option(None, "generated images: --output_dir of sample.py, a folder, or an .npz file")
    reference: str | None = option(
        None, "real images: a folder (searched recursively), a prepared dataset, or an .npz"
    )
    metrics: list[str] = option(["kid", "fid"], "metrics to compute", choices=METRICS, nargs="+")
    feature_extractor: str = option(
        "efficientnet_lite0",
        "network of the features: inception, efficientnet_lite0, a TorchScript file of Inception (.pt), or the folder "
        "or Hub id of a vision model of transformers (DINOv2, CLIP, ...)",
    )
    output_file: str | None = option(None, "JSON file for the scores; default: print them only")
    num_images: int | None = option(
        None, "maximum number of images per side, drawn at random by --seed; default: all", within="[1, inf)"
    )
    batch_size: int = option(
        64, "images per batch of the feature extractor; does not change the scores", within="[1, inf)"
    )
    seed: int = option(
        0, "seed of the draws: --num_images, KID's subsets, the halves of the noise floor", within="[0, inf)"
    )
    held_out: str | None = option(
        None, "real images that were not trained on: search for samples that copy a reference image"
    )
    closest_pairs_file: str | None = option(
        None, "picture of the samples nearest to a reference image, above that image"
    )
    classifier_data_dir: str | None = option(
        None, "real images with classes, or a prepared dataset: train a classifier that judges the samples"
    )
    retrieval_captions: int = option(
        10, "number of captions from which a sample's own is retrieved; chance is 1 / this", within="[2, inf)"
    )
    cache_dir: str | None = option(
        None, "folder for weights, features and classifiers; default: $TRAINKIT_CACHE, else ~/.cache/trainkit"
    )


def evaluate(options: Options) -> dict | None:
    """Features of all images, computed by all processes; the main process returns what the report needs."""
    from trainkit.evaluation.features import open_extractor
    from trainkit.evaluation.images import describe_splits, open_images, read_sampling_record
    from trainkit.evaluation.reference import check_count, choose_images, reference_features, score_images
    from trainkit.processes import end_together
    from trainkit.training.launch import refuse_dynamo_config, start_accelerator

    refuse_dynamo_config("evaluate_samples.py")
    record = read_sampling_record(options.generated)
    generated = open_images(options.generated, "--generated")
    reference = open_images(options.reference, "--reference", skip_unreadable=True)
    held_out = None
    if options.held_out is not None:
        held_out = open_images(options.held_out, "--held_out", skip_unreadable=True)
    samples = choose_images(generated, "generated", options.num_images, options.seed)
    references = choose_images(reference, "reference", options.num_images, options.seed)
    extractor = open_extractor(options.feature_extractor, options.cache_dir)
    accelerator = start_accelerator("no")
    accuracy = None if options.classifier_data_dir is None else judge_classes(options, generated, samples)

    compute = extractor, options.batch_size, accelerator
    made = score_images(generated, samples, *compute, "generated")
    real = reference_features(reference, references, *compute, options.cache_dir)
    check_count("reference", len(real.indices))  # unreadable images are left out
    if held_out is not None:
        chosen = choose_images(held_out, "held_out", options.num_images, options.seed)
        held_out = score_images(held_out, chosen, *compute, "held-out")
    sides = (("--generated", generated), ("--reference", reference))
    is_main = accelerator.is_main_process
    end_together(accelerator)
    if not is_main:
        return None
    return {
        **score(options, extractor, made, real),
        "sampling": record or None,
        "splits": {flag: splits for flag, images in sides if (splits := describe_splits(images))},
        "accuracy": accuracy,
        "memorization": search_copies(options, made, real, held_out),
        **compare_conditions(options, extractor.weights_sha256, made, real),
    }


def score(options: Options, extractor: "FeatureExtractor", made: "ScoredImages", real: "ScoredImages") -> dict:
    """The metrics of all images, and everything that they depend on."""
    from trainkit.evaluation.metrics import noise_floor, scores
    from trainkit.evaluation.report import comparability

    num_generated, num_reference = len(made.indices), len(real.indices)
    floor, floor_size = noise_floor(real.features, num_generated, options.metrics, options.seed)
    return {
        "scores": scores(real.features, made.features, options.metrics, options.seed),
        "noise_floor": floor,
        "num_generated": num_generated,
        "num_reference": num_reference,
        "num_noise_floor": floor_size,
        "note": comparability(extractor.weights_sha256, num_generated, num_reference),
        "feature_extractor": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
        "generated": options.generated,
        "reference": options.reference,
        "same_images": made.images.fingerprint == real.images.fingerprint,
        "seed": options.seed,
        "unreadable_reference": {str(real.images.files[index]): why for index, why in real.images.unreadable.items()},
    }


def search_copies(
    options: Options, made: "ScoredImages", real: "ScoredImages", held_out: "ScoredImages | None"
) -> dict | None:
    """Nearest reference images of the samples, in feature and in pixel space; None unless a flag requests it."""
    if held_out is None and options.closest_pairs_file is None:
        return None
    from trainkit.evaluation.memorization import closest_pairs, memorization, save_closest_pairs, thumbnails

    found: dict = {"held_out": options.held_out}
    for space in ("features", "pixels"):
        training, samples, spare = (
            None if side is None else side.features if space == "features" else thumbnails(side.images, side.indices)
            for side in (real, made, held_out)
        )
        found[space] = memorization(training, samples, spare)
    pairs = closest_pairs(made, real)
    found["closest_pairs"] = [pair._asdict() for pair in pairs]
    if options.closest_pairs_file is not None:
        save_closest_pairs(Path(options.closest_pairs_file), made.images, real.images, pairs)
    return found


def judge_classes(options: Options, images, indices) -> dict:
    """The share of the samples `indices` that show the requested class, by a classifier of `--classifier_data_dir`."""
    from trainkit.data.files import cache_root
    from trainkit.evaluation.classifier import open_classifier
    from trainkit.evaluation.conditioning import check_requested_labels, label_accuracy
    from trainkit.evaluation.conditions import read_annotations
    from trainkit.evaluation.images import open_images

    flag = "--classifier_data_dir"
    real = open_images(options.classifier_data_dir, flag, skip_unreadable=True)
    requested, annotations = read_annotations(images, "--generated"), read_annotations(real, flag)
    labels = [requested.labels[index] for index in indices]
    flag = f"{flag} {options.classifier_data_dir}"
    check_requested_labels(labels, annotations.label_names, options.generated, flag)
    classifier = open_classifier(real, annotations, flag, cache_root(options.cache_dir), options.seed)
    found = label_accuracy(labels, classifier.predict(images, indices), classifier)
    return found | {"trained_on": options.classifier_data_dir, "num_unreadable": len(real.unreadable)}


def compare_conditions(options: Options, weights_sha256: str, made: "ScoredImages", real: "ScoredImages") -> dict:
    """Scores per class and caption retrieval, if both sides have classes or captions."""
    from trainkit.evaluation.conditioning import caption_retrieval, scores_per_class
    from trainkit.evaluation.conditions import read_annotations

    requested, found = read_annotations(made.images, "--generated"), {}
    if not (requested.has_labels or requested.has_texts):
        return found
    annotations = read_annotations(real.images, "--reference")

    def of_both(name: str) -> tuple:
        values = [
            [getattr(side, name)[index] for index in scored.indices]
            for side, scored in ((annotations, real), (requested, made))
        ]
        return real.features, values[0], made.features, values[1]

    if requested.has_labels and annotations.has_labels:
        found["per_class"] = scores_per_class(*of_both("labels"), options.metrics, options.seed, weights_sha256)
    if requested.has_texts and annotations.has_texts:
        found["retrieval"] = caption_retrieval(*of_both("texts"), options.retrieval_captions, options.seed)
    return found


def print_scores(result: dict, metrics: list[str]) -> None:
    """One line per score, with everything that it depends on."""
    from trainkit.evaluation.report import describe_sampling, format_score

    for name in metrics:
        print(
            f"{name.upper()} {format_score(result['scores'], name)} | "
            f"noise floor {format_score(result['noise_floor'], name)} "
            f"({result['num_noise_floor']} real against {result['num_noise_floor']} real) | "
            f"{result['num_generated']} generated, {result['num_reference']} reference | "
            f"{describe_sampling(result['sampling'])} | {result['feature_extractor']}, weights "
            f"{result['weights_sha256'][:12]} | resize {result['resize']} | {result['note']}"
        )
    for flag, splits in result["splits"].items():
        print(f"{flag}: images of the splits {splits} are all used; give the folder of one split to use it alone")
    if result["same_images"]:
        print("WARNING: --generated and --reference hold the same images")
    for name, why in list(result["unreadable_reference"].items())[:10]:
        print(f"--reference: {name} cannot be read ({why})")
    if result["unreadable_reference"]:
        print(f"--reference: left out {len(result['unreadable_reference'])} images that cannot be read")


def print_memorization(result: dict) -> None:
    """One line per space in which copies were searched."""
    found = result["memorization"]
    for space in ("features", "pixels") if found else ():
        values = found[space]
        line = (
            f"MEMORIZATION in {space}: {values['num_copies']} of {result['num_generated']} samples equal a reference "
            "image"
        )
        if "share_too_near" in values:
            line += (
                f"; {values['share_too_near']:.1%} are nearer to one than 99 % of {values['num_held_out']} held-out "
                "images (about 1 % is expected)"
            )
        print(line)


def print_conditioning(result: dict, metrics: list[str]) -> None:
    """One line per class and per kind of condition, with the chance level and the accuracy of the classifier."""
    from trainkit.evaluation.report import format_score, format_share

    for label, of_class in list((result.get("per_class") or {}).items())[:20]:
        values = ", ".join(
            f"{name.upper()} {format_score(of_class['scores'], name)} "
            f"(noise floor {format_score(of_class['noise_floor'], name)})"
            for name in metrics
        )
        print(
            f"class {label}: {values} | {of_class['num_generated']} generated, {of_class['num_reference']} reference "
            f"| {of_class['note']}"
        )
    if accuracy := result.get("accuracy"):
        print(
            f"ACCURACY {format_share(accuracy)} of {accuracy['n']} samples show the requested class | chance "
            f"{accuracy['chance']:.1%} | the classifier is right on {format_share(accuracy['classifier'])} of "
            f"{accuracy['classifier']['n']} real images of {accuracy['trained_on']} that it was not trained on | "
            f"{accuracy['num_without_label']} samples without a class left out"
        )
    if retrieval := result.get("retrieval"):
        print(
            f"RETRIEVAL {format_share(retrieval)} of {retrieval['n']} samples are nearest to the real images of "
            f"their caption, among {retrieval['num_captions']} captions | chance {retrieval['chance']:.1%} | "
            f"{retrieval['num_not_judged']} samples whose caption no real image has left out"
        )


def main() -> None:
    options = parse_options(Options, __doc__)
    for name in ("generated", "reference"):
        if getattr(options, name) is None:
            raise UserError(f"--{name} is missing: give a folder of images")
    for name, kind in (("output_file", "JSON file"), ("closest_pairs_file", "PNG file")):
        value = getattr(options, name)
        if value is not None and Path(value).is_dir():
            raise UserError(f"--{name} {value} is a folder: give the name of a {kind}")
    if options.closest_pairs_file is not None and Path(options.closest_pairs_file).suffix != ".png":
        raise UserError(f"--closest_pairs_file {options.closest_pairs_file} must end in .png")
    result = evaluate(options)
    if result is None:  # not the main process
        return
    print_scores(result, options.metrics)
    print_memorization(result)
    print_conditioning(result, options.metrics)
    if options.output_file is not None:
        file = Path(options.output_file)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, result)
        except OSError as error:
            raise UserError(f"--output_file {file} cannot be written: {one_line(error)}") from None


if __name__ == "__main__":
    run_script(main)
