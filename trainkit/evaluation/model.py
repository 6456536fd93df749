"""A saved model and a reference to score it against: what evaluate_samples.py opens for --model_name_or_path."""

from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from pipelines.conditional import ConditionalPipeline
from trainkit.errors import UserError
from trainkit.evaluation.candidates import Candidates, Cell
from trainkit.evaluation.features import FeatureExtractor, open_extractor
from trainkit.evaluation.images import ImageArray, open_images
from trainkit.evaluation.reference import (
    ScoredImages,
    check_count,
    choose_images,
    reference_features,
    warn_of_few_images,
    warn_of_other_size,
)
from trainkit.evaluation.report import comparability
from trainkit.evaluation.spool import spooled
from trainkit.processes import main_process_first
from trainkit.sampling.cascade import open_cascade
from trainkit.sampling.choice import default_steps, named_scheduler
from trainkit.sampling.conditions import ALL, Conditions, read_conditions
from trainkit.sampling.generate import Pipeline, generate_in_blocks, image_shape
from trainkit.sampling.load import find_pipeline, load_pipeline
from trainkit.sampling.schedulers import check_steps, describe_scheduler, load_scheduler
from trainkit.sampling.weights import weights_digest
from trainkit.terminal import say

DEFAULT_IMAGES = 1000


class Model(NamedTuple):
    """A pipeline on the device, what its images show, and where its table is stored.

    `candidates` are the rows of `--sweep`.
    """

    pipeline: Pipeline
    conditions: Conditions | None
    folder: Path
    candidates: Candidates
    table_dir: Path
    weights_sha256: str
    num_images: int


def open_model(options: Any, accelerator: Accelerator) -> Model:
    """The model of evaluate_samples.py's `options`. Class labels cycle through all classes unless some are given.

    Raises:
        UserError: it cannot be loaded, or it is on the Hub and --sweep has no folder to write to.
    """
    with main_process_first():
        folder = find_pipeline(options.model_name_or_path)
    if options.sweep is not None and options.table_dir is None and not Path(options.model_name_or_path).is_dir():
        raise UserError(
            f"--table_dir is missing: {options.model_name_or_path} is on the Hub, name a folder to write to"
        )
    pipeline = load_pipeline(folder, load_scheduler(folder)).to(accelerator.device)
    if "class_labels" in getattr(pipeline, "conditions", ()) and options.class_labels is None:
        options.class_labels = [ALL]
    conditions = read_conditions(options, pipeline)
    count = options.num_images or DEFAULT_IMAGES
    check_count("num_images", count)
    table_dir = folder if options.table_dir is None else Path(options.table_dir)
    if conditions is not None and count % len(conditions) and accelerator.is_main_process:
        say(f"--num_images {count} is not a multiple of {len(conditions)} conditions: some get one image more")
    candidates = Candidates(folder, options.teacher_model_name_or_path)
    return Model(pipeline, conditions, folder, candidates, table_dir, weights_digest(folder), count)


def open_reference(options: Any, accelerator: Accelerator, side: int) -> tuple[ScoredImages, FeatureExtractor]:
    """The features of all reference images, for images of `side` pixels, and their extractor. A collective."""
    images: Any = open_images(options.reference, "--reference", skip_unreadable=True)
    extractor = open_extractor(options.feature_extractor, options.cache_dir)
    chosen = choose_images(images, "reference", None, options.seed)
    found = reference_features(images, chosen, extractor, options.batch_size, accelerator, options.cache_dir)
    check_count("reference", len(found.indices))
    if accelerator.is_main_process:
        warn_of_few_images(options.metrics, len(found.indices), options.num_images or DEFAULT_IMAGES)
        warn_of_other_size(images, side)
    return found, extractor


def table_settings(options: Any, model: Model, reference: ScoredImages, extractor, accelerator: Accelerator) -> dict:
    """Everything but the weights, the scheduler and the steps that the scores of a table depend on."""
    shape = image_shape(model.pipeline)
    return {
        "metrics": list(options.metrics),
        "num_images": model.num_images,
        "num_reference": len(reference.indices),
        "reference": options.reference,
        "reference_fingerprint": reference.images.fingerprint,
        "feature_extractor": extractor.name,
        "extractor_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
        "seed": options.seed,
        "mixed_precision": accelerator.mixed_precision,
        "height_width": list(shape[:2]),
        **({} if model.conditions is None else model.conditions.settings()),
        "note": comparability(extractor.weights_sha256, model.num_images, len(reference.indices)),
    }


def sample_model(options: Any, accelerator: Accelerator) -> tuple[dict, ImageArray]:
    """The record and the images of the model, on every process, with the scheduler that sample.py would use."""
    model = open_model(options, accelerator)
    steps = options.num_inference_steps or default_steps(model.folder)
    name, scheduler, why = named_scheduler(model.folder, options.scheduler, steps)
    say(why)
    check_steps(scheduler, steps)
    model.pipeline.scheduler = scheduler
    cascade = open_cascade(options, model.pipeline)
    for upsampler in cascade.upsamplers:
        upsampler.pipeline.to(accelerator.device)
    seeds, conditions = range(options.seed, options.seed + model.num_images), model.conditions
    blocks = generate_in_blocks(
        accelerator,
        model.pipeline,
        seeds,
        steps,
        options.sample_batch_size,
        None if conditions is None else conditions.for_images(range(len(seeds))),
        cascade.upsamplers,
        **({} if conditions is None else conditions.guidance),
    )
    last = cascade.upsamplers[-1].pipeline if cascade.upsamplers else model.pipeline
    images = spooled(accelerator, blocks, (len(seeds), *image_shape(last)))
    record = {"scheduler_name": name, "scheduler": describe_scheduler(scheduler), "num_inference_steps": steps}
    record |= {"weights_sha256": model.weights_sha256, **cascade.settings, **cascade.names}
    rows = [] if conditions is None else [conditions.row(index) for index in range(len(images))]
    conditioning = [row["conditioning_image"] for row in rows if "conditioning_image" in row] or None
    return record | ({} if conditions is None else conditions.guidance), ImageArray(images, conditioning)


def pipeline_of_row(model: Model, cell: Cell, accelerator: Accelerator) -> Pipeline:
    """The pipeline of a row of `--sweep`, on the device, with its scheduler."""
    folder, name = model.candidates.open(cell)
    scheduler = load_scheduler(folder, name)
    if folder != model.folder:
        other = load_pipeline(folder, scheduler).to(accelerator.device)
        if isinstance(other, ConditionalPipeline):
            other.image_size = model.pipeline.image_size  # that of the pictures, if there are any
        return other
    model.pipeline.scheduler = scheduler
    return model.pipeline
