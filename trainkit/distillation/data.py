"""The images and conditions that a distillation learns from, checked against its teacher."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.conditional import ConditionalPipeline
from trainkit.data.cache import is_prepared, open_or_prepare
from trainkit.data.files import cache_root
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.pairing import NEEDS_PAIRS, describe_pairs
from trainkit.data.trial import num_images
from trainkit.diffusion.combined import CombinedCondition
from trainkit.diffusion.conditioning import ClassCondition, ImageCondition, VectorCondition, vector_purpose
from trainkit.diffusion.image_condition import PictureCondition
from trainkit.diffusion.latents import LatentImages, check_latent_options, encode_images
from trainkit.diffusion.paired_condition import PairedCondition
from trainkit.diffusion.text import TextCondition, load_text_encoder
from trainkit.distillation.teacher import FLAG, SavedTeacher
from trainkit.errors import UserError
from trainkit.hub.options import check_hub_options
from trainkit.options.distillation import DistillationOptions
from trainkit.options.script import ConditionalTrainingOptions, TrainingOptions
from trainkit.sampling.generate import image_shape
from trainkit.sampling.students import RECORD, read_distillation
from trainkit.training.averages.power_ema import check_ema_power_lengths
from trainkit.training.learning_rate_finder import check_learning_rate_search
from trainkit.training.optimizers import check_optimization
from trainkit.training.output_folder import check_output_dir
from trainkit.training.score import check_score
from trainkit.training.start import prepare_process
from trainkit.training.trackers import check_tracker
from trainkit.training.validation import open_validation_images


@dataclass
class DistillationData:
    """Images, held-out images and the condition of each, and the options of the engine for them."""

    engine: TrainingOptions
    images: PreparedImages | LatentImages
    held_out: PreparedImages | LatentImages | None
    condition: ImageCondition | None
    held_out_condition: ImageCondition | None


def check_options(options: DistillationOptions, engine: TrainingOptions) -> None:
    """Raise `UserError` for settings that cannot work, before any image is prepared."""
    check_score(engine)
    check_optimization(engine)
    check_ema_power_lengths(engine)
    check_learning_rate_search(engine)
    check_latent_options(engine)
    check_hub_options(options)
    check_output_dir(engine)
    earlier = read_distillation(Path(options.output_dir))
    if earlier is not None and options.resume_from_checkpoint is None and not options.overwrite_output_dir:
        raise UserError(
            f"--output_dir {options.output_dir} holds {RECORD} of an earlier distillation: continue it with "
            "--resume_from_checkpoint latest, or start again with --overwrite_output_dir"
        )
    check_tracker(engine.logger)  # the last: it may ask a server


def open_data(options: DistillationOptions, engine: TrainingOptions, teacher: SavedTeacher) -> DistillationData:
    """Open or prepare the images, and encode what the teacher needs encoded. Raises `UserError` if they do not fit."""
    given = f"--train_data_dir {options.train_data_dir}"
    if options.dataset_name is not None:
        given = f"--dataset_name {options.dataset_name}"
    with _pairs_as_of(teacher):
        images = open_or_prepare(_data_options(engine, teacher))
        check_images(teacher, images, given)
        prepare_process(engine)
        condition = open_student_condition(engine, teacher, images, given)
        held_out = open_validation_images(engine, images)
    held_out_condition = None if held_out is None or condition is None else condition.for_images(held_out)
    if not engine.max_train_steps and not engine.max_train_images:
        engine = replace(engine, max_train_images=engine.num_epochs * num_images(images))
    return DistillationData(engine, *encode_images(engine, images, held_out), condition, held_out_condition)


def _data_options(engine: TrainingOptions, teacher: SavedTeacher) -> TrainingOptions:
    """`engine` as the images are opened: what prepared images are is compared with the teacher, not with flags."""
    if teacher.image_input is None:
        return engine
    assert isinstance(engine, ConditionalTrainingOptions)
    if teacher.pairs is None:  # conditioning images that the data has too are not used
        return replace(engine, condition=[kind for kind in engine.condition if kind != "image"])
    if is_prepared(engine):
        return replace(engine, conditioning_image_mode=None, conditioning_classes=None)
    return engine


@contextlib.contextmanager
def _pairs_as_of(teacher: SavedTeacher) -> Iterator[None]:
    """Inside the block a `UserError` says that it is the teacher that needs pairs, not a flag of train_conditional."""
    try:
        yield
    except UserError as error:
        needs = f"{FLAG} {teacher.name} was trained on pairs, and needs conditioning images"
        raise UserError(str(error).replace(NEEDS_PAIRS, needs)) from None


def check_images(teacher: SavedTeacher, images: PreparedImages, given: str) -> None:
    """Raise `UserError` unless `images` (of the flag and value `given`) are such as the teacher was trained on."""
    wanted, found = image_shape(teacher.pipeline), (images.height, images.width, images.channels)
    if wanted != found:
        sizes = ["{}x{} pixels and {} channels".format(*shape) for shape in (found, wanted)]
        raise UserError(
            f"{given} holds images of {sizes[0]}, but {FLAG} {teacher.name} makes {sizes[1]}: prepare the images at "
            "that size, or give another teacher"
        )
    if teacher.pairs not in (None, images.pairs):
        raise UserError(
            f"{given} has {describe_pairs(images.pairs)}, but {FLAG} {teacher.name} takes {teacher.pairs}: prepare "
            "the images again, or give another teacher"
        )


def open_student_condition(
    options: TrainingOptions, teacher: SavedTeacher, images: PreparedImages, given: str
) -> ImageCondition | None:
    """The condition of `images` as the teacher takes it; None for an unconditional teacher. Raises `UserError`."""
    if not teacher.conditions:
        return None
    assert isinstance(options, ConditionalTrainingOptions)
    parts = [_open_one(options, teacher, images, given, kind) for kind in teacher.conditions]
    return parts[0] if len(parts) == 1 else CombinedCondition(parts)


def _open_one(
    options: ConditionalTrainingOptions, teacher: SavedTeacher, images: PreparedImages, given: str, kind: str
) -> ClassCondition | VectorCondition | TextCondition | PictureCondition:
    assert isinstance(teacher.pipeline, ConditionalPipeline)
    dropout = options.conditioning_dropout
    if teacher.image_input is not None and kind == "image":
        vae = teacher.pipeline.vae
        if teacher.pairs is not None:
            return PairedCondition(images, dropout, vae)
        return PictureCondition(images, teacher.image_input, dropout, vae)
    if kind == "text":
        encoder = load_text_encoder(options)
        return TextCondition(images, encoder, cache_root(options.cache_dir), given, dropout)
    if kind == "vector":
        length = teacher.pipeline.vector_embedding.config.vector_length
        if images.vector_length != length:
            raise UserError(
                f"{given} has vectors of {images.vector_length or 0} numbers, but {FLAG} {teacher.name} takes {length}"
            )
        return VectorCondition(images, dropout, vector_purpose(teacher.conditions))
    names = _class_names(teacher.pipeline, images)
    unknown = sorted(set(images.label_names or ()) - set(names))
    if images.label_names is None or unknown:
        problem = f"has the class {unknown[0]}" if unknown else "has no classes"
        raise UserError(
            f"{given} {problem}; {FLAG} {teacher.name} knows {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        )
    return ClassCondition(images, names, dropout)


def _class_names(pipeline: ConditionalPipeline, images: PreparedImages) -> list[str]:
    """The names of the teacher's classes in the order of their numbers; those of `images` if it has none."""
    names = pipeline.config.id2label
    if names:
        return [names[number] for number in sorted(names)]
    labels = images.label_names or []
    return list(labels) if len(labels) == pipeline.num_classes else [str(n) for n in range(pipeline.num_classes)]
