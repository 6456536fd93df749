"""A saved pipeline as the page shows it: its condition, schedulers, steps, and the table that was measured on it."""

import copy
from dataclasses import dataclass
from pathlib import Path

from pipelines.image_input import ImageInput
from trainkit.diffusion.few_step import is_few_step, student_steps
from trainkit.diffusion.frozen import local_device
from trainkit.errors import UserError
from trainkit.sampling.catalogue import CATALOGUE, OWN_SCHEDULER
from trainkit.sampling.choice import choose_scheduler, default_steps
from trainkit.sampling.generate import Pipeline, image_shape
from trainkit.sampling.load import FLAG, find_pipeline, load_pipeline
from trainkit.sampling.schedulers import available_schedulers, check_steps, load_scheduler
from trainkit.sampling.table import read_table, score_text, time_text
from trainkit.sampling.weights import weights_digest

SOLVER_STEPS = 100  # end of the slider for solvers that are good at few steps
DEFAULT_GUIDANCE = 2.0  # of classes, vectors and prompts
LONG_CHAINS = ("ddim", "ddpm")  # schedulers that are made for many steps


PICTURES = {
    "downscale": "from small images", "mask": "fills masks", "grayscale": "from grey images", "edges": "from edges",
    "picture": "from other images", "labels": "from label maps",
}  # fmt: skip


@dataclass(frozen=True)
class AppModel:
    """A loaded pipeline and what is known of it. Requests use `pipeline_with`, whose scheduler is their own."""

    name: str
    folder: Path
    pipeline: Pipeline
    schedulers: list[str]
    table: dict
    default_scheduler: str
    default_steps: int
    most_steps: int  # that any of its schedulers accepts
    is_student: bool

    @property
    def conditions(self) -> list[str]:
        """The names of the conditions besides an image: class_labels, vectors, both or prompt; empty without one."""
        return [name for name in getattr(self.pipeline, "conditions", ()) if name not in ("image", "mask_image")]

    @property
    def image_input(self) -> ImageInput | None:
        """What the second image is, of a model that is conditioned on images."""
        return getattr(self.pipeline, "image_input", None)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the second image in training."""
        assert self.image_input is not None  # of a model that is conditioned on images
        height, width, _ = image_shape(self.pipeline)
        return height // self.image_input.factor, width // self.image_input.factor

    @property
    def is_conditional(self) -> bool:
        return bool(self.conditions) or self.image_input is not None

    @property
    def default_guidance(self) -> float:
        """Students have theirs folded in, and an image says so much that guidance would overdo it."""
        return 1.0 if self.is_student or self.image_input is not None else DEFAULT_GUIDANCE

    @property
    def class_names(self) -> list[str]:
        """The name of each class, or its number; empty without classes."""
        if "class_labels" not in self.conditions:
            return []
        names = self.pipeline.config.id2label or {}
        return [names.get(label, str(label)) for label in range(self.pipeline.num_classes)]

    @property
    def vector_length(self) -> int | None:
        """Numbers in a vector; None without vectors."""
        return self.pipeline.vector_embedding.config.vector_length if "vectors" in self.conditions else None

    def pipeline_with(self, scheduler: str, steps: int) -> Pipeline:
        """A pipeline that shares the weights and has its own scheduler, so that requests do not disturb each other.

        Raises:
            UserError: the model has no such scheduler, or the scheduler does not accept `steps`.
        """
        if scheduler not in self.schedulers:
            raise UserError(f"Scheduler: {self.name} has no {scheduler}; choose one of {', '.join(self.schedulers)}")
        own = copy.copy(self.pipeline)
        own.scheduler = load_scheduler(self.folder, scheduler)
        check_steps(own.scheduler, steps, "Steps")
        return own

    def slider_end(self, scheduler: str) -> int:
        """The largest number of steps of the slider for this scheduler."""
        return self.most_steps if scheduler in LONG_CHAINS else min(self.most_steps, SOLVER_STEPS)


def open_model(name_or_path: str) -> AppModel:
    """Load a saved pipeline onto this machine's device. No code in its folder is executed.

    Raises:
        UserError: there is no such pipeline, or it is of an unsupported kind.
    """
    folder = find_pipeline(name_or_path)
    own = load_scheduler(folder)
    student, steps = is_few_step(own), default_steps(folder)
    pipeline = load_pipeline(folder, own).to(local_device())
    image_input = getattr(pipeline, "image_input", None)
    if image_input is not None and image_input.kind not in PICTURES:
        raise UserError(f"{FLAG} {name_or_path}: the page takes no {image_input.kind} as condition: use sample.py")
    fitting = available_schedulers(folder)
    return AppModel(
        name=name_or_path.rstrip("/\\") if not Path(name_or_path).is_dir() else folder.resolve().name,
        folder=folder,
        pipeline=pipeline,
        schedulers=fitting if student else [*fitting, OWN_SCHEDULER],
        table=read_table(folder, weights_digest(folder)),
        default_scheduler=choose_scheduler(folder, steps)[0],
        default_steps=steps,
        most_steps=student_steps(own) if student else own.config.num_train_timesteps,
        is_student=student,
    )


def first_setting(model: AppModel, number: int) -> tuple[str, int]:
    """Scheduler and steps that the page starts with: the model's own, and half the steps for the second setting."""
    if number == 0 or model.is_student:
        return model.default_scheduler, model.default_steps
    steps = max(1, model.default_steps // 2)
    return choose_scheduler(model.folder, steps)[0], steps


def describe(model: AppModel) -> str:
    """One line about a model: image size, condition, parameters."""
    height, width, channels = image_shape(model.pipeline)
    kinds = {
        "class_labels": f"{len(model.class_names)} classes",
        "vectors": f"vectors of {model.vector_length} numbers",
        "prompt": "prompts",
    }
    known = [kinds[name] for name in model.conditions]
    known += [PICTURES[model.image_input.kind]] if model.image_input else []
    colour = {1: "grey", 3: "colour", 4: "colour with transparency"}[channels]
    millions = sum(parameter.numel() for parameter in model.pipeline.unet.parameters()) / 1e6
    student = f", student of {_count(model.most_steps, 'step')}" if model.is_student else ""
    return f"{width}×{height} {colour}, {' and '.join(known) or 'unconditional'}{student}, {millions:.3g} M parameters"


def hint(model: AppModel, scheduler: str, steps: int) -> str:
    """What is known of a scheduler at so many steps: the row of the model's table, else that of the catalogue."""
    cells = [cell for cell in model.table.get("cells", []) if cell["scheduler"] == scheduler]
    exact = [cell for cell in cells if cell["steps"] == steps]
    if exact:
        return f"Measured at {_count(steps, 'step')}: {_measured(model, exact[0])}.{_better(model, exact[0])}"
    advice = ""
    if scheduler in CATALOGUE:
        made_for = CATALOGUE[scheduler].steps
        advice = f" Made for {made_for}{'' if 'steps' in made_for else ' steps'}."
    if cells:
        nearest = min(cells, key=lambda cell: abs(cell["steps"] - steps))
        return f"Nearest measured: {_count(nearest['steps'], 'step')}, {_measured(model, nearest)}.{advice}"
    return advice.strip() or ("Own scheduler of the model." if scheduler == OWN_SCHEDULER else "")


def table_rows(model: AppModel) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the model's table, best score first; two empty lists without one."""
    if not model.table:
        return [], []
    metric = _metric(model)
    cells = sorted(model.table["cells"], key=lambda cell: cell["scores"][metric])
    rows = [
        [cell["scheduler"], str(cell["steps"]), _score(model, cell).partition(" ")[2],
         f"{cell['seconds_per_1000_images']:.3g}"]
        for cell in cells
    ]  # fmt: skip
    return ["scheduler", "steps", f"{metric.upper()} (lower is better)", "s per 1,000 images"], rows


def _metric(model: AppModel) -> str:
    return model.table["settings"]["metrics"][0]


def _measured(model: AppModel, cell: dict) -> str:
    return f"{_score(model, cell)}, {time_text(cell)}"


def _score(model: AppModel, cell: dict) -> str:
    return score_text(cell, _metric(model)).replace("+-", "±")


def _better(model: AppModel, cell: dict) -> str:
    """The best row of the table that calls the UNet no more often, if it is another one."""
    metric = _metric(model)
    best = min(
        (one for one in model.table["cells"] if one["calls"] <= cell["calls"]), key=lambda one: one["scores"][metric]
    )
    if best["scores"][metric] >= cell["scores"][metric]:
        return " No measured setting is better with as few UNet calls."
    return f" Better: {best['scheduler']}, {_count(best['steps'], 'step')}, {_score(model, best)}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
