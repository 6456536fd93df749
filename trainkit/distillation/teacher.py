"""The pipeline to distill: what it predicts, over which noise schedule, under which condition."""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from pipelines.image_input import ImageInput
from trainkit.data.pairing import PAIR_FLAGS, PairSettings, flag_against
from trainkit.diffusion import few_step
from trainkit.diffusion.distillation import student_prediction
from trainkit.diffusion.image_condition import condition_from
from trainkit.diffusion.noise_schedule import NoiseScheduler, prediction_type_of, saved_noise_scheduler
from trainkit.diffusion.paired_condition import PAIRED_KINDS, pairs_of_input
from trainkit.errors import UserError, renamed_flags
from trainkit.options.distillation import DistillationOptions
from trainkit.options.script import ConditionalTrainingOptions, TrainingOptions
from trainkit.sampling.generate import Pipeline, image_shape
from trainkit.sampling.load import find_pipeline, load_pipeline
from trainkit.sampling.schedulers import load_scheduler

FLAG = "--teacher_model_name_or_path"
# Muon scales every gradient to one size, also the noisy ones of low noise levels: KID 0.57 instead of 0.19 after 600
# steps (benchmarks/results.md).
CONSISTENCY_OPTIMIZER, CONSISTENCY_LEARNING_RATE = "adamw", 5e-4
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
# argument of the pipeline -> --condition
KINDS = {"class_labels": "class", "vectors": "vector", "prompt": "text", "image": "image"}
DERIVED = ("downscale", "grayscale", "mask", "edges")  # second images that are made from the images themselves


@dataclass
class SavedTeacher:
    """The pipeline to distill, with the noise schedule that it was trained over."""

    name: str
    folder: Path
    pipeline: Pipeline
    noise_scheduler: NoiseScheduler

    @property
    def conditions(self) -> list[str]:
        """class, vector, both or text, and image; empty for an unconditional teacher."""
        return [KINDS[name] for name in getattr(self.pipeline, "conditions", ()) if name in KINDS]

    @property
    def image_input(self) -> ImageInput | None:
        """What its second image is, if it has one."""
        return getattr(self.pipeline, "image_input", None)

    @property
    def pairs(self) -> PairSettings | None:
        """What its second images are if the data has them; None if they are made from the images."""
        return pairs_of_input(self.image_input)

    @property
    def has_latents(self) -> bool:
        return getattr(self.pipeline, "vae", None) is not None

    @property
    def prediction_type(self) -> str:
        return prediction_type_of(self.noise_scheduler)

    @property
    def clips(self) -> bool:
        """Whether its sampler clips images to [-1, 1]."""
        return not self.has_latents and bool(self.noise_scheduler.config.get("clip_sample", True))

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """alpha_bar (T,) float64 of its students."""
        return few_step.student_schedule(self.noise_scheduler)

    @cached_property
    def unet(self) -> UNet2DModel | UNet2DConditionModel:
        """Its UNet as it is trained: with the embedding of vectors inside."""
        return trainable_unet(self.pipeline)


def open_teacher(options: DistillationOptions) -> SavedTeacher:
    """The pipeline of `--teacher_model_name_or_path`. Raises `UserError` if it cannot be distilled."""
    name = options.teacher_model_name_or_path
    if name is None:
        raise UserError(f"{FLAG} is missing: give the folder of a saved pipeline, or a Hub id")
    with renamed_flags(model_name_or_path=FLAG[2:]):
        folder = find_pipeline(name)
        scheduler = load_scheduler(folder)
        if few_step.is_few_step(scheduler):
            raise UserError(
                f"{FLAG} {name} is itself a student of {few_step.student_steps(scheduler)} steps: give its teacher"
            )
        noise_scheduler = saved_noise_scheduler(str(folder))
        if noise_scheduler is None:
            raise UserError(f"{FLAG} {name} has no scheduler that says what it was trained for: add scheduler/")
        pipeline = load_pipeline(folder, noise_scheduler)
    teacher = SavedTeacher(name, folder, pipeline, noise_scheduler)
    _check_teacher(options, teacher)
    return teacher


def _check_teacher(options: DistillationOptions, teacher: SavedTeacher) -> None:
    given = f"{FLAG} {teacher.name}"
    if teacher.prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"{given} predicts {teacher.prediction_type}; students can be made of {', '.join(PREDICTION_TYPES)}"
        )
    if teacher.image_input is not None and teacher.image_input.kind not in (*DERIVED, *PAIRED_KINDS):
        raise UserError(
            f"{given} is conditioned on images of the kind {teacher.image_input.kind}; those of the kinds "
            f"{', '.join((*DERIVED, *PAIRED_KINDS))} can be distilled"
        )
    _check_pair_flags(options, teacher, given)
    if teacher.unet.config.time_embedding_type != "positional":
        kind = teacher.unet.config.time_embedding_type
        raise UserError(f"{given}: its UNet has {kind} timesteps; only sinusoidal ones (positional) can be distilled")
    if options.guidance_scale == 1:
        return
    scale = f"--guidance_scale {options.guidance_scale:g}"
    if not teacher.conditions:
        raise UserError(f"{scale}: {given} is unconditional; remove the flag")
    if options.method == "consistency":
        raise UserError(f"{scale}: --method consistency learns from images, not from guided ones; use progressive")
    if getattr(teacher.pipeline, "guidance_unet", None) is not None:
        raise UserError(f"{scale}: {given} is guided by a guidance_unet, which is not supported; use 1")


def _check_pair_flags(options: DistillationOptions, teacher: SavedTeacher, given: str) -> None:
    """Raise `UserError` for flags of conditioning images that the teacher does not take."""
    pairs = teacher.pairs
    for name in (*PAIR_FLAGS, "validation_conditioning_data_dir"):
        value = getattr(options, name)
        if value is not None and pairs is None:
            raise UserError(f"--{name} {value}: {given} was not trained on pairs; remove the flag")
    if pairs is not None and (flag := flag_against(pairs, options)) is not None:
        raise UserError(f"{flag}: {given} takes {pairs}; remove the flag")


def engine_options(options: DistillationOptions, teacher: SavedTeacher) -> TrainingOptions:
    """The options of the training engine; the model, its objective and its conditions are those of the teacher."""
    conditions, config = teacher.conditions, teacher.noise_scheduler.config
    options_class = ConditionalTrainingOptions if conditions else TrainingOptions
    height, width, channels = image_shape(teacher.pipeline)
    shared = {field.name for field in fields(options)} & {field.name for field in fields(options_class)}
    values = {name: getattr(options, name) for name in shared} | {
        "prediction_type": student_prediction(teacher.prediction_type),
        "ddpm_num_steps": config.num_train_timesteps,
        "resolution": options.resolution or f"{height}x{width}",
        "image_mode": options.image_mode or {1: "L", 3: "RGB", 4: "RGBA"}[channels],
    }
    folder = str(teacher.folder)
    if options.method == "consistency":  # None where they were not given
        values["optimizer"] = options.optimizer or CONSISTENCY_OPTIMIZER
        values["learning_rate"] = CONSISTENCY_LEARNING_RATE if options.learning_rate is None else options.learning_rate
    if teacher.has_latents:
        values |= {"vae_name_or_path": folder, "model_config_name_or_path": folder}  # whose sizes must fit
    if conditions:
        values |= {"condition": conditions, "preview_guidance_scale": 1.0}
        values |= {"text_encoder_name_or_path": folder} if "text" in conditions else {}
    if teacher.pairs is not None:
        maps = teacher.pairs.classes is not None
        values["conditioning_classes"] = teacher.pairs.classes
        values["conditioning_image_mode"] = None if maps else teacher.pairs.mode
    elif teacher.image_input is not None:
        values["condition_from"] = condition_from(teacher.image_input)
    return options_class(**values)


def trainable_unet(pipeline: Pipeline) -> UNet2DModel | UNet2DConditionModel:
    """The UNet of `pipeline` as it is trained: the embedding of vectors is a part of it."""
    embedding = getattr(pipeline, "vector_embedding", None)
    if embedding is not None:
        pipeline.unet.class_embedding = embedding
    return pipeline.unet
