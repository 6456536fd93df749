"""A folder that distill.py wrote: which saved pipeline takes how many steps, and which teacher they come from."""

import json
from pathlib import Path

from diffusers import LCMScheduler

from trainkit.diffusion.few_step import student_steps
from trainkit.sampling.schedulers import load_scheduler

RECORD, STAGES = "distillation.json", "stages"


def read_distillation(output_dir: Path) -> dict | None:
    """distillation.json of a folder, or None."""
    try:
        return json.loads((output_dir / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def stage_folder(output_dir: Path, name: str) -> Path:
    """The folder of a stage that is not the last one, such as `steps-8`."""
    return output_dir / STAGES / name


def student_folders(output_dir: Path) -> dict[int, Path]:
    """Number of steps -> the saved pipeline that samples in as many, for the student in `output_dir` and its stages.

    A progressive student has one number of steps. A consistency student has the powers of two up to its own.
    """
    own = load_scheduler(output_dir)
    most = student_steps(own)
    if isinstance(own, LCMScheduler):
        powers = [1 << bit for bit in range(most.bit_length()) if 1 << bit < most]
        return {steps: output_dir for steps in [*powers, most]}
    found = {most: output_dir}
    for folder in output_dir.glob(f"{STAGES}/steps-*"):
        if (folder / "model_index.json").is_file():
            found[student_steps(load_scheduler(folder))] = folder
    return dict(sorted(found.items()))
