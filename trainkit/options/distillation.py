"""Options of distill.py: the teacher, and how few steps its student takes."""

from dataclasses import dataclass

from trainkit.options.data import ImageOptions, LoadingOptions, PairOptions, SourceOptions
from trainkit.options.fields import option
from trainkit.options.training import RunOptions


@dataclass
class TeacherOptions:
    """distillation: the teacher, the method and the number of steps"""

    teacher_model_name_or_path: str | None = option(
        None, "folder or Hub id of the pipeline to distill; nothing in it is executed"
    )
    method: str = option(
        "progressive",
        "progressive: halve the steps of the teacher stage by stage (Salimans & Ho 2022); consistency: one student "
        "for 1 to --num_steps steps, trained on the images (Geng et al. 2024)",
        choices=("progressive", "consistency"),
    )
    num_steps: int = option(
        4, "steps of the final student: 1, 2, 4, ... with progressive; the most steps with consistency",
        within="[1, 64]",
    )  # fmt: skip
    first_steps: int | None = option(
        None,
        "progressive: steps of the first student, --num_steps times a power of two; default: the first such number "
        "from 32 on",
        within="[1, 512]",
    )
    guidance_scale: float = option(
        1.0,
        "progressive, conditional teachers: guidance scale that the first student learns, so that no student needs "
        "guidance; 1: none",
        within="[1, inf)",
    )
    conditioning_dropout: float = option(
        0.1, "probability that an image is distilled without its condition, so that None stays usable",
        within="[0, 1]",
    )  # fmt: skip
    random_flip: bool = option(False, "mirror each image left to right with probability 1/2")
    validation_conditioning_data_dir: str | None = option(
        None, "folder of the conditioning images of --validation_data_dir, as --conditioning_data_dir"
    )


@dataclass
class DistillationOptions(TeacherOptions, SourceOptions, PairOptions, ImageOptions, LoadingOptions, RunOptions):
    """The options of distill.py. The length of the run is that of all stages together."""
