"""The commands that come next: resume what was stopped, sample what was trained."""

import shlex
from pathlib import Path

from trainkit.options.script import ConditionalTrainingOptions, TrainingOptions
from trainkit.options.training import SECRET_OPTIONS
from trainkit.training.config_file import CONFIG_NAME
from trainkit.training.launch import launch_command


def resume_command(output_dir: Path, settings: object, num_processes: int, device_type: str) -> str:
    """The command that continues the run in `output_dir`: its config.yaml, and a place for each secret option."""
    secrets = [f"--{name} ..." for name in SECRET_OPTIONS if getattr(settings, name, None)]
    words = [launch_command(num_processes, device_type), "--config", shlex.quote(str(output_dir / CONFIG_NAME))]
    return " ".join([*words, *secrets, "--resume_from_checkpoint latest"])


def _conditions_name(options: ConditionalTrainingOptions) -> str:
    """A name for the folder of conditioning images that says what belongs into it."""
    kind = (options.condition_from or "conditioning").partition(":")[0]
    return {"downscale": "small_images", "mask": "images --mask_dir masks"}.get(kind, f"{kind}_images")


def sample_command(options: TrainingOptions) -> str:
    """The command that samples the saved pipeline."""
    output_dir = options.output_dir.rstrip("/")
    words = ["python sample.py --model_name_or_path", shlex.quote(output_dir)]
    words += ["--output_dir", shlex.quote(f"{output_dir}-samples")]
    if isinstance(options, ConditionalTrainingOptions):
        flags = {
            "class": "--class_labels all",
            "text": "--prompts_file prompts.txt",
            "vector": "--vectors_file vectors.npy",
            "image": f"--conditioning_dir {_conditions_name(options)}",
        }
        words += [flags[kind] for kind in options.condition]
    return " ".join(words)
