"""Which scheduler a saved model is sampled with, and in how many steps."""

from pathlib import Path

from diffusers import SchedulerMixin

from trainkit.diffusion.few_step import is_few_step, student_steps
from trainkit.sampling.catalogue import DEFAULT_SCHEDULER, DEFAULT_STEPS, OWN_SCHEDULER, recommended_scheduler
from trainkit.sampling.schedulers import describe_scheduler, load_scheduler, shipped_schedulers
from trainkit.sampling.table import TABLE_NAME, read_table
from trainkit.sampling.weights import weights_digest


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


def calls_of(scheduler: SchedulerMixin, steps: int) -> int:
    """How often the UNet is called for one image."""
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)
