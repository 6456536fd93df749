"""The stages of a distillation: which student each trains, from which teacher, with which options of the engine.

OUTPUT/stages/steps-32/     a training run of its own, whose saved pipeline is the teacher of the next stage
OUTPUT/stages/steps-16/
OUTPUT/                     the last stage
OUTPUT/distillation.json    teacher, settings, and the stages that are complete
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from pipelines.conditional import ConditionalPipeline
from trainkit.atomic import write_json
from trainkit.data.loading.loader import Batch
from trainkit.data.trial import num_images
from trainkit.diffusion import few_step
from trainkit.diffusion.conditioning import ImageCondition
from trainkit.diffusion.distillation import Teacher, student_prediction
from trainkit.distillation.teacher import FLAG, SavedTeacher, trainable_unet
from trainkit.errors import UserError
from trainkit.options.distillation import DistillationOptions
from trainkit.options.script import TrainingOptions
from trainkit.processes import on_main_process, wait_for_everyone
from trainkit.sampling.generate import Pipeline
from trainkit.sampling.load import load_pipeline
from trainkit.sampling.pipeline import conditional_pipeline, unconditional_pipeline
from trainkit.sampling.schedulers import load_scheduler
from trainkit.sampling.students import RECORD, read_distillation, stage_folder
from trainkit.sampling.weights import weights_digest
from trainkit.terminal import counted
from trainkit.training.device import compile_unet, move_to_device
from trainkit.training.output_folder import claim_output_dir
from trainkit.training.run import Run
from trainkit.training.start import count_steps
from trainkit.training.trackers import run_name

ADAPTED = "adapted"
ALWAYS_DROPPED = -1.0  # a draw below any probability of a dropout
FIRST_STEPS = 32  # of the first student: its teacher takes 64
PREVIEW_STEPS = 50  # at most, for grids and scores: a student of 1,000 steps takes a part of them
SETTINGS = ("method", "num_steps", "first_steps", "guidance_scale", "seed")


@dataclass(frozen=True)
class Stage:
    """One student. `substeps` steps of its teacher become one of its own; 0 for consistency tuning."""

    name: str
    num_steps: int
    substeps: int
    share: int = 1  # of the run's length, relative to the other stages

    def __str__(self) -> str:
        if self.name == ADAPTED:
            return "a copy of the teacher that predicts what students predict"
        return f"a student of {counted(self.num_steps, 'step')}" if self.substeps else "a consistency student"


def plan_stages(options: DistillationOptions, teacher: SavedTeacher) -> list[Stage]:
    """The stages in order. Raises `UserError` for numbers of steps that halving does not reach.

    A teacher that predicts noise or a flow velocity first gets a student that predicts what it does at equal steps.
    The students of 1 and 2 steps train twice as long as the others (Salimans & Ho 2022, section 5).
    """
    num_steps, first = options.num_steps, _first_steps(options)
    total = len(teacher.alphas_cumprod)
    adapt = student_prediction(teacher.prediction_type) != teacher.prediction_type
    if options.method == "consistency":
        return [*([Stage(ADAPTED, total, 1)] if adapt else []), Stage(f"steps-{num_steps}", num_steps, 0, 4)]
    if 2 * first > total:
        raise UserError(f"--first_steps {first}: its teacher takes {2 * first} steps, but was trained over {total}")
    stages = [Stage(ADAPTED, 2 * first, 1)] if adapt else []
    while first >= num_steps:
        stages.append(Stage(f"steps-{first}", first, 2, 2 if first <= 2 else 1))
        first //= 2
    return stages


def _first_steps(options: DistillationOptions) -> int:
    num_steps, first = options.num_steps, options.first_steps
    if num_steps & (num_steps - 1):
        raise UserError(f"--num_steps {num_steps} must be a power of two, such as 1, 2, 4 or 8")
    if first is None:
        return max(FIRST_STEPS, num_steps)
    if options.method == "consistency":
        raise UserError(f"--first_steps {first}: --method consistency has no stages; remove the flag")
    if first < num_steps or first & (first - 1):
        raise UserError(f"--first_steps {first} must be a power of two and at least --num_steps {num_steps}")
    return first


class Distillation:
    """The stages of one output folder. Create it, and call it, on every rank, which share its folder."""

    def __init__(
        self, options: DistillationOptions, engine: TrainingOptions, teacher: SavedTeacher, accelerator: Accelerator
    ):
        self.options, self.engine, self.teacher, self.accelerator = options, engine, teacher, accelerator
        self.output_dir, self.stages = Path(options.output_dir), plan_stages(options, teacher)
        self.unet = teacher.unet  # the teacher of the next stage
        self.prediction_type = student_prediction(teacher.prediction_type)

    @property
    def settings(self) -> dict:
        """What the students depend on, for distillation.json."""
        return {name: getattr(self.options, name) for name in SETTINGS} | {
            "teacher": self.options.teacher_model_name_or_path,
            "teacher_sha256": weights_digest(self.teacher.folder),
        }

    def folder(self, stage: Stage) -> Path:
        """The output folder of the run of `stage`: that of the whole distillation for the last one."""
        return self.output_dir if stage == self.stages[-1] else stage_folder(self.output_dir, stage.name)

    def start(self) -> None:
        """Write distillation.json, or check that the stages there are of this distillation. A collective."""
        on_main_process(self._start)

    def _start(self) -> None:
        claim_output_dir(self.engine).release()  # each stage holds the lock of its own folder
        earlier = read_distillation(self.output_dir)
        if earlier is None:
            write_json(self.output_dir / RECORD, self.settings | {"complete": []})
            return
        for name, value in self.settings.items():
            if name != "teacher" and earlier.get(name) != value:
                flag = FLAG if name == "teacher_sha256" else f"--{name}"
                raise UserError(
                    f"--output_dir {self.output_dir} holds stages with another {flag} (was "
                    f"{earlier.get('teacher' if flag == FLAG else name)}): use it again, another folder, or "
                    "--overwrite_output_dir"
                )

    def is_complete(self, stage: Stage) -> bool:
        """Whether an earlier start has finished `stage`, by the file that the main process sees. A collective."""
        return on_main_process(lambda: stage.name in (read_distillation(self.output_dir) or {}).get("complete", []))

    def complete(self, stage: Stage) -> None:
        """Record that `stage` is finished."""
        if self.accelerator.is_main_process:
            record = read_distillation(self.output_dir) or self.settings | {"complete": []}
            write_json(self.output_dir / RECORD, record | {"complete": [*record["complete"], stage.name]})
        wait_for_everyone()

    def next_teacher(self, stage: Stage) -> None:
        """Make the saved student of `stage` the teacher of the next one, if any."""
        if stage == self.stages[-1]:
            return
        folder = self.folder(stage)
        unet = trainable_unet(load_pipeline(folder, load_scheduler(folder)))
        if unet.config.time_embedding_type == "learned":
            unet = few_step.without_time_table(unet, self.teacher.unet)
        self.unet = unet

    def options_of(self, stage: Stage) -> TrainingOptions:
        """The options of the run of `stage`: its share of the length, and a seed of its own."""
        number, last = self.stages.index(stage), stage == self.stages[-1]
        engine = self.engine

        def share(length: int | None) -> int | None:
            whole = sum(each.share for each in self.stages)
            return None if length is None else max(1, length * stage.share // whole)

        return replace(
            engine,
            output_dir=str(self.folder(stage)),
            overwrite_output_dir=False,
            max_train_steps=share(engine.max_train_steps),
            max_train_images=share(engine.max_train_images),
            seed=engine.seed + number,
            ddpm_num_inference_steps=max(n for n in range(1, PREVIEW_STEPS + 1) if stage.num_steps % n == 0),
            push_to_hub=engine.push_to_hub and last,
            tracker_run_name=run_name(engine, self.output_dir) + ("" if last else f"-{stage.name}"),
            hub_model_id=engine.hub_model_id or self.output_dir.resolve().name,
        )

    def count_steps(self, first: Stage, run: Run) -> int:
        """The optimizer steps of all stages from `first` on, whose global batch is that of `run`."""
        stages = self.stages[self.stages.index(first) :]
        size = run.shape.global_size
        return sum(count_steps(self.options_of(stage), num_images(run.images), size) for stage in stages)

    def frozen_teacher(self, stage: Stage, condition: ImageCondition | None) -> Teacher:
        """The teacher of `stage`, on the device, with guidance in the first stage."""
        first = stage == self.stages[0]
        device = self.accelerator.device
        unet = move_to_device(copy.deepcopy(self.unet), replace(self.engine, gradient_checkpointing=False), device)
        compile_unet(unet, self.engine, 2, device)  # as for two micro-steps: no CUDA graphs
        guided = first and self.options.guidance_scale > 1
        return Teacher(
            unet.eval().requires_grad_(False),
            self.teacher.prediction_type if first else self.prediction_type,
            self.teacher.clips and first,
            self.accelerator.autocast,
            self.options.guidance_scale if guided else 1.0,
            _without_condition(condition, device) if guided and condition is not None else lambda batch: batch,
        )

    def pipeline_of(self, stage: Stage) -> Callable[[torch.nn.Module], Pipeline]:
        """A function that makes the pipeline of a student of `stage` from its UNet."""
        teacher, alphas_cumprod = self.teacher, self.teacher.alphas_cumprod
        prediction = self.prediction_type
        if stage.substeps == 0:
            clips = not teacher.has_latents
            alphas_cumprod = few_step.consistency_schedule(alphas_cumprod)
            scheduler = few_step.consistency_scheduler(alphas_cumprod, stage.num_steps, prediction, clips)
        else:
            scheduler = few_step.progressive_scheduler(alphas_cumprod, stage.num_steps, prediction)
        timesteps = few_step.step_timesteps(len(alphas_cumprod), stage.num_steps) if stage.substeps else None

        def build(unet: torch.nn.Module) -> Pipeline:
            return student_pipeline(teacher.pipeline, unet, scheduler, timesteps)

        return build

    def origin(self, stage: Stage) -> str:
        """What the student of `stage` is, for its card."""
        name = self.teacher.name
        if Path(name).is_dir():
            name = Path(name).resolve().name
        how = "consistency tuning (Geng et al. 2024)"
        if stage.substeps:
            how = "progressive distillation (Salimans & Ho 2022)"
            guided = self.options.guidance_scale
            how += f" with a guidance scale of {guided:g}, which it needs no more" if guided > 1 else ""
        steps = f"takes {stage.num_steps} steps" if stage.substeps else f"takes 1 to {stage.num_steps} steps"
        return (
            f"It {steps}, and its scheduler refuses more: always give `num_inference_steps`. It was distilled from "
            f"`{name}` by {how}."
        )


def student_pipeline(teacher: Pipeline, unet, scheduler, timesteps: torch.Tensor | None) -> Pipeline:
    """The pipeline of a student: stock like its teacher's, with the teacher's other components.

    `timesteps` (N,) are those of a progressive student, which the UNet gets as 0 to N - 1 from its scheduler.
    """
    by_pipeline = None
    if timesteps is not None and few_step.takes_time_table(unet):
        unet = few_step.with_time_table(unet, timesteps)
    elif timesteps is not None:
        by_pipeline = timesteps.tolist()
    if not isinstance(teacher, ConditionalPipeline):
        return unconditional_pipeline(unet, scheduler, teacher.components.get("vae"))
    components = {name: teacher.components[name] for name in ("text_encoder", "tokenizer", "vae", "image_input")}
    settings = {name: teacher.config.get(name) for name in ("id2label", "prompt_length")}
    return conditional_pipeline(unet, scheduler, unet_timesteps=by_pipeline, **components, **settings)


def _without_condition(condition: ImageCondition, device: torch.device) -> Callable[[Batch], Batch]:
    """A function that gives a batch the null conditions."""
    picture = condition.picture

    def without(batch: Batch) -> Batch:
        nothing = condition.inputs(batch.indices, lambda purpose: np.full(len(batch.indices), ALWAYS_DROPPED))
        null = {name: value.to(device, non_blocking=True) for name, value in nothing.items()}
        if picture is None or batch.picture is None:
            return replace(batch, condition=null)
        return replace(batch, condition=null, picture=picture.image_input.null(batch.picture))

    return without
