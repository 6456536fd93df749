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

    # quality and time of a saved model by scheduler and steps; no image is written
    python evaluate_samples.py --model_name_or_path ddpm-64 --reference photos --num_images 2000 \\
        --sweep ddpm:1000 ddim:10,20,50 dpmsolver:5,10,20 sde_dpmsolver:10,20,50

    # students of distill.py beside their teacher, at the numbers of steps that are usually compared
    python evaluate_samples.py --model_name_or_path ddpm-64-4-steps --reference photos --num_images 2000 --sweep

`--model_name_or_path` samples a saved pipeline as sample.py does and scores the images. With `--sweep` it does so for
each scheduler and number of steps, with the same seeds. The table goes into the model's folder (sampling_table.json,
two pictures, README.md), where sample.py finds the best scheduler for a number of steps. Run the command again after
an interruption: only missing rows are made.

`--paired` adds PSNR and SSIM of samples against their true images, for models that are conditioned on images: the true
image is that of --reference with the name of the conditioning image.

`--held_out` adds a search for copies: the share of samples that are nearer to a reference image than 99 % of the
held-out images are. `accelerate launch evaluate_samples.py ...` splits the images over all processes.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.atomic import write_json
from trainkit.errors import UserError, one_line, run_script
from trainkit.options.fields import option
from trainkit.options.parsing import parse_options
from trainkit.options.terminal import TerminalOptions
from trainkit.options.training import cpu_threads_option, mixed_precision_option
from trainkit.sampling.cascade import CascadeOptions
from trainkit.sampling.conditions import ConditionOptions
from trainkit.terminal import only_warn, say

if TYPE_CHECKING:  # torch takes seconds to import, --help does not need it
    from trainkit.evaluation.features import FeatureExtractor
    from trainkit.evaluation.reference import ScoredImages

WITHOUT_SWEEP = (
    "paired", "held_out", "closest_pairs_file", "classifier_data_dir", "output_file", "retrieval_captions",
    *(field.name for field in fields(CascadeOptions)),
)  # fmt: skip
METRICS = ("kid", "fid", "fid_infinity", "precision", "recall", "density", "coverage")


@dataclass
class ModelOptions:
    """model: sample a saved pipeline and score it, instead of --generated"""

    model_name_or_path: str | None = option(None, "folder of a saved pipeline, or a Hub id; nothing in it is executed")
    scheduler: str | None = option(None, "scheduler, as in sample.py; default: what sample.py would use")
    num_inference_steps: int | None = option(
        None, "scheduler steps; default: 20, or all of a few-step student", within="[1, inf)"
    )
    sweep: list[str] | None = option(
        None,
        "schedulers and steps to compare: ddim:10,20,50 dpmsolver:5,10 (names: sample.py --list_schedulers); for a "
        "few-step student: student:1,4 teacher/ddim:50; without words: a useful choice of them",
        nargs="*",
    )
    teacher_model_name_or_path: str | None = option(
        None, "with --sweep of a few-step student: its teacher; default: the one that distillation.json names"
    )
    table_dir: str | None = option(None, "folder for the table of --sweep; default: the model's folder")
    sample_batch_size: int = option(64, "images per process and batch of the pipeline", within="[1, inf)")
    mixed_precision: str | None = mixed_precision_option()


@dataclass
class ScoreOptions:
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
    output_file: str | None = option(
        None, "JSON file for the scores; scores.json in a model's folder also goes into its card and its report.html"
    )
    num_images: int | None = option(
        None,
        "maximum number of images per side, drawn at random by --seed; default: all. With --model_name_or_path: "
        "images to sample (default: 1,000), against all of the reference",
        within="[1, inf)",
    )
    batch_size: int = option(
        64, "images per batch of the feature extractor; does not change the scores", within="[1, inf)"
    )
    seed: int = option(
        0, "seed of the draws: --num_images, KID's subsets, the noise floor, the first sample", within="[0, inf)"
    )
    cpu_threads: int = cpu_threads_option()
    held_out: str | None = option(
        None, "real images that were not trained on: search for samples that copy a reference image"
    )
    closest_pairs_file: str | None = option(
        None, "picture of the samples nearest to a reference image, above that image"
    )
    classifier_data_dir: str | None = option(
        None, "real images with classes, or a prepared dataset: train a classifier that judges the samples"
    )
    paired: bool = option(
        False,
        "PSNR and SSIM of each sample against its true image: that of --reference with the name of the conditioning "
        "image, else of the sample",
    )
    retrieval_captions: int = option(
        10, "number of captions from which a sample's own is retrieved; chance is 1 / this", within="[2, inf)"
    )
    cache_dir: str | None = option(
        None, "folder for weights, features and classifiers; default: $TRAINKIT_CACHE, else ~/.cache/trainkit"
    )


@dataclass
class Options(ScoreOptions, ModelOptions, ConditionOptions, CascadeOptions, TerminalOptions):
    """The options of evaluate_samples.py."""


def evaluate(options: Options) -> dict | None:
    """Features of all images, computed by all processes; the main process returns what the report needs."""
    from trainkit.evaluation.conditional_scores import compare_conditions, judge_classes
    from trainkit.evaluation.features import open_extractor
    from trainkit.evaluation.images import describe_splits, open_images, read_sampling_record
    from trainkit.evaluation.memorization import search_copies
    from trainkit.evaluation.pairs import compare_pairs
    from trainkit.evaluation.reference import (
        check_count,
        choose_images,
        reference_features,
        score_images,
        warn_of_few_images,
        warn_of_other_size,
    )
    from trainkit.processes import end_together
    from trainkit.training.launch import refuse_dynamo_config, start_accelerator

    refuse_dynamo_config("evaluate_samples.py")
    reference = open_images(options.reference, "--reference", skip_unreadable=True)
    held_out, of_files = None, options.model_name_or_path is None
    if options.held_out is not None:
        held_out = open_images(options.held_out, "--held_out", skip_unreadable=True)
    references = choose_images(reference, "reference", options.num_images if of_files else None, options.seed)
    if of_files:
        record, generated = read_sampling_record(options.generated), open_images(options.generated, "--generated")
    extractor = open_extractor(options.feature_extractor, options.cache_dir)
    accelerator = start_accelerator("no" if of_files else options.mixed_precision, options.cpu_threads)
    if not of_files:
        from trainkit.evaluation.model import sample_model

        record, generated = sample_model(options, accelerator)
        options.generated = options.model_name_or_path  # the name of this side in reports
    samples = choose_images(generated, "generated", options.num_images, options.seed)
    accuracy = None if options.classifier_data_dir is None else judge_classes(options, generated, samples)

    compute = extractor, options.batch_size, accelerator
    made = score_images(generated, samples, *compute, "generated")
    real = reference_features(reference, references, *compute, options.cache_dir)
    check_count("reference", len(real.indices))  # unreadable images are left out
    if accelerator.is_main_process:
        warn_of_few_images(options.metrics, len(made.indices), len(real.indices))
        warn_of_other_size(reference, generated.side)
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
        "paired": compare_pairs(made, real) if options.paired else None,
        "memorization": search_copies(made, real, held_out, options.held_out, options.closest_pairs_file),
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


def sweep(options: Options) -> None:
    """Score each scheduler and number of steps of `--sweep`, and write the table after each."""
    from trainkit.evaluation.model import open_model, open_reference, pipeline_of_row, table_settings
    from trainkit.evaluation.sweep import describe_cell, measure, needs_features, sample_features
    from trainkit.evaluation.sweep_report import missing_cells, open_table, store_cell, write_pictures
    from trainkit.processes import end_together, wait_for_everyone
    from trainkit.report.refresh import refresh
    from trainkit.sampling.generate import image_shape
    from trainkit.sampling.table import table_lines
    from trainkit.training.launch import refuse_dynamo_config, start_accelerator

    refuse_dynamo_config("evaluate_samples.py")
    accelerator = start_accelerator(options.mixed_precision, options.cpu_threads)
    model = open_model(options, accelerator)
    cells = model.candidates.parse(options.sweep)
    side = max(image_shape(model.pipeline)[:2])
    reference, extractor = open_reference(options, accelerator, side)
    settings = table_settings(options, model, reference, extractor, accelerator)
    table = open_table(model.table_dir, model.weights_sha256, settings)
    missing = missing_cells(cells, table)
    wait_for_everyone()  # no process writes before all have read the table
    keep = needs_features(options.metrics, model.num_images, extractor.num_features)
    for number, cell in enumerate(missing, start=1):
        say(f"{cell.scheduler}, {cell.steps} steps: row {number} of {len(missing)}")
        pipeline = pipeline_of_row(model, cell, accelerator)
        seeds = range(options.seed, options.seed + model.num_images)
        sampled = sample_features(
            accelerator, pipeline, extractor, seeds, cell.steps, options.sample_batch_size, model.conditions,
            model.candidates.guidance_scale(cell), keep,
        )  # fmt: skip
        if accelerator.is_main_process:
            values = measure(sampled, reference.features, options.metrics, options.seed)
            row = describe_cell(cell, model.candidates, model.num_images, sampled.seconds, values)
            store_cell(model.table_dir, table, row, sampled.first)
            write_pictures(model.table_dir, table)
        wait_for_everyone()
    if accelerator.is_main_process:
        write_pictures(model.table_dir, table)
        with only_warn(f"card and report in {model.table_dir} are not updated"):
            refresh(model.table_dir)
        print("\n".join(table_lines(table)))
        print(f"{len(missing)} rows made now, {len(cells) - len(missing)} made before; see {model.table_dir}")
    end_together(accelerator)


def check(options: Options) -> None:
    """Raise `UserError` for flags that are missing or contradict each other, before anything is read."""
    if options.model_name_or_path is None and options.generated is None:
        raise UserError("--generated is missing: give a folder of images, or a model with --model_name_or_path")
    if options.model_name_or_path is not None and options.generated is not None:
        raise UserError("--generated and --model_name_or_path both say what to score: give one of them")
    if options.reference is None:
        raise UserError("--reference is missing: give a folder of images")
    defaults = Options()
    if options.model_name_or_path is None:
        for field in (*fields(ModelOptions), *fields(ConditionOptions), *fields(CascadeOptions)):
            if getattr(options, field.name) != getattr(defaults, field.name):
                raise UserError(f"--{field.name} needs --model_name_or_path, the model to sample")
    if options.sweep is not None:
        for name in ("scheduler", "num_inference_steps", *WITHOUT_SWEEP):
            if getattr(options, name) != getattr(defaults, name):
                raise UserError(f"--{name} does nothing with --sweep: remove it")
    elif options.table_dir is not None:
        raise UserError("--table_dir is the folder of the table that --sweep writes: give --sweep too")
    elif options.teacher_model_name_or_path is not None:
        raise UserError("--teacher_model_name_or_path is compared with its student by --sweep: give --sweep too")
    if options.model_name_or_path is not None and options.classifier_data_dir is not None:
        raise UserError("--classifier_data_dir reads the classes of --generated: sample with sample.py, then score")
    for name, kind in (("output_file", "JSON file"), ("closest_pairs_file", "PNG file")):
        value = getattr(options, name)
        if value is not None and Path(value).is_dir():
            raise UserError(f"--{name} {value} is a folder: give the name of a {kind}")
    if options.closest_pairs_file is not None and Path(options.closest_pairs_file).suffix != ".png":
        raise UserError(f"--closest_pairs_file {options.closest_pairs_file} must end in .png")


def main() -> None:
    options = parse_options(Options, __doc__)
    check(options)
    if options.sweep is not None:
        sweep(options)
        return
    result = evaluate(options)
    if result is None:  # not the main process
        return
    from trainkit.evaluation.printing import print_conditioning, print_memorization, print_paired, print_scores

    print_scores(result, options.metrics)
    print_paired(result)
    print_memorization(result)
    print_conditioning(result, options.metrics)
    if options.output_file is not None:
        from trainkit.report.refresh import refresh
        from trainkit.report.scores import SCORES_NAME

        file = Path(options.output_file)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, result)
            if file.name == SCORES_NAME:
                with only_warn(f"card and report in {file.parent} are not updated"):
                    refresh(file.parent)
        except OSError as error:
            raise UserError(f"--output_file {file} cannot be written: {one_line(error)}") from None


if __name__ == "__main__":
    run_script(main)
