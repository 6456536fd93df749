"""sampling_table.json of a model's folder: quality and time of its schedulers, and which of them to sample with."""

import json
from collections.abc import Iterable
from pathlib import Path

from diffusers import SchedulerMixin

from trainkit.diffusion.few_step import is_few_step, student_steps
from trainkit.errors import UserError
from trainkit.sampling.catalogue import (
    CATALOGUE,
    DEFAULT_SCHEDULER,
    DEFAULT_STEPS,
    OWN_SCHEDULER,
    recommended_scheduler,
)
from trainkit.sampling.load import weights_digest
from trainkit.sampling.schedulers import describe_scheduler, load_scheduler, shipped_schedulers

TABLE_NAME = "sampling_table.json"
STUDENT, TEACHER = "student", "teacher/"  # names of rows of a few-step student: itself, and its teacher's schedulers


def read_table(folder: Path, weights_sha256: str | None = None) -> dict:
    """The table of a model, {} if it has none, or one of other weights than `weights_sha256`.

    Raises:
        UserError: the file is not readable.
    """
    file = folder / TABLE_NAME
    if not file.is_file():
        return {}
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        known = [(cell["scheduler"], cell["steps"], cell["calls"], cell["scores"]) for cell in table["cells"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not a readable table: delete it, or repeat evaluate_samples.py --sweep") from None
    if weights_sha256 is not None and table.get("weights_sha256") != weights_sha256:
        return {}
    return table if known else {}


def choose_scheduler(folder: Path, steps: int) -> tuple[str, str]:
    """The name of the scheduler for `steps`, and why: a line for the user.

    The best of the table among those that call the UNet `steps` times. Without one, the pipeline's own scheduler if it
    is not the one that training saves, else the recommended one for so many steps.
    """
    own, shipped = load_scheduler(folder), shipped_schedulers(folder)
    if is_few_step(own):
        return OWN_SCHEDULER, f"scheduler: that of a few-step student, {type(own).__name__}"
    table = read_table(folder, weights_digest(folder)) if (folder / TABLE_NAME).is_file() else {}
    rows = [cell for cell in table.get("cells", []) if cell["steps"] == cell["calls"] == steps]
    if rows:
        metric = table["settings"]["metrics"][0]
        best = min(rows, key=lambda cell: cell["scores"][metric])
        why = f"the lowest {metric.upper()} of {len(rows)} schedulers at {steps} steps in {folder / TABLE_NAME}"
        return best["scheduler"], f"--scheduler {best['scheduler']}: {why}"
    saved = load_scheduler(folder, DEFAULT_SCHEDULER) if DEFAULT_SCHEDULER in shipped else None
    if saved is not None and describe_scheduler(own) != describe_scheduler(saved):
        return OWN_SCHEDULER, f"scheduler: the pipeline's own {type(own).__name__}"
    name = recommended_scheduler(steps)
    missing = f" (no row of {TABLE_NAME} has as many)" if table else ""
    return name, f"--scheduler {name}: recommended for {steps} steps{missing}"


def named_scheduler(folder: Path, name: str | None, steps: int) -> tuple[str, SchedulerMixin, str]:
    """The name and the scheduler of `--scheduler`, or of `choose_scheduler` without it, and a line that says which."""
    why = f"--scheduler {name}"
    if name is None:
        name, why = choose_scheduler(folder, steps)
    return name, load_scheduler(folder, name), why


def default_steps(folder: Path) -> int:
    """The steps of `--num_inference_steps` if it is not given: all steps of a few-step student."""
    own = load_scheduler(folder)
    return student_steps(own) if is_few_step(own) else DEFAULT_STEPS


def list_lines(bundle: Iterable[str], table: dict, stock: bool) -> list[str]:
    """What `sample.py --list_schedulers` prints: a line per scheduler, and one per row of the table.

    For a `stock` model (`is_stock_pipeline`) they say which schedulers DDPMPipeline runs.
    """
    rows = table.get("cells", [])
    names = [*bundle, *(row["scheduler"] for row in rows)]  # the rows of a few-step student have names of their own
    cells = {name: [cell for cell in rows if cell["scheduler"] == name] for name in names}
    metric = table["settings"]["metrics"][0] if table else ""
    lines = []
    for name in cells:
        facts = CATALOGUE.get(name)
        if facts is None:
            lines.append(f"{name:14} {_describe_row(name)}")
        else:
            runs = "runs in DDPMPipeline, " if facts.in_stock_pipeline else "not in DDPMPipeline, "
            noise = "stochastic" if facts.stochastic else "deterministic"
            calls = ", 2 UNet calls per step" if facts.doubles_calls else ""
            known = f"{facts.method}, order {facts.order}, {noise}, {runs if stock else ''}steps: {facts.steps}{calls}"
            lines.append(f"{name:14} {known}")
        lines += [
            f"    {cell['steps']:5} steps  {score_text(cell, metric)}  {time_text(cell)}" for cell in cells[name]
        ]
    return lines


def _describe_row(name: str) -> str:
    if name == STUDENT:
        return "this student, or that of as many steps under stages/"
    return "a scheduler of its teacher" if name.startswith(TEACHER) else "the scheduler of this folder"


def score_text(cell: dict, metric: str) -> str:
    """`KID 0.0123 +- 0.0012`."""
    error = cell["scores"].get(f"{metric}_se")
    return f"{metric.upper()} {cell['scores'][metric]:.4g}" + ("" if error is None else f" +- {error:.2g}")


def time_text(cell: dict) -> str:
    return f"{cell['seconds_per_1000_images']:.3g} s per 1,000 images"


def calls_of(scheduler: SchedulerMixin, steps: int) -> int:
    """How often the UNet is called for one image."""
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)
