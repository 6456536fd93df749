"""The experiment tracker of a run: its project and name, and its metrics in four groups.

    train/       loss, learning rate, gradient norm, images seen
    validation/  held-out loss, in all and by noise level
    score/       KID of samples
    speed/       images/s, waiting time, memory

metrics.jsonl keeps its own flat names.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator, tracking

from trainkit.errors import UserError, one_line
from trainkit.options.training import SECRET_OPTIONS, LoggingOptions
from trainkit.packages import load_package

VALIDATION, SCORE = "validation_loss", "kid"
TRAIN = ("loss", "lr", "grad_norm", "images", "loss_scale")
WITHOUT_LOGIN = ("offline", "disabled", "dryrun")  # values of WANDB_MODE
CONSTANT = ("kid_n", "kid_reference_n", "kid_num_inference_steps")  # of a run: settings, not curves


def check_tracker(logger: str) -> None:
    """Raise `UserError` if `--logger` cannot work, before anything is written.

    Its package must be installed: without it Accelerate would log nothing, silently. Weights & Biases needs a login,
    which is checked on the first process of all; on a terminal, its package asks for the key.
    """
    if logger != "none" and logger not in map(str, tracking.get_available_trackers()):
        raise UserError(f"--logger {logger}: its package is not installed: pip install {logger}, or --logger none")
    if logger == "wandb" and os.environ.get("RANK", "0") == "0" and os.environ.get("WANDB_MODE") not in WITHOUT_LOGIN:
        wandb = load_package("wandb", "--logger wandb")
        try:
            wandb.login(verify=True)
        except wandb.Error as error:
            raise _cannot_start(logger, error) from None


def _cannot_start(logger: str, error: Exception) -> UserError:
    hint = "log in with `wandb login` or set WANDB_MODE=offline" if logger == "wandb" else "fix this"
    return UserError(f"--logger {logger} cannot start ({one_line(error)}): {hint}, or use --logger none")


def tracked_values(row: dict, num_processes: int = 1) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl under the tracker's names, without the step and what never changes."""
    left_out = {"step", *CONSTANT} | ({"images_per_s_per_device"} if num_processes == 1 else set())
    return {
        tracked_name(name): value for name, value in row.items() if name not in left_out and not isinstance(value, str)
    }


def tracked_name(name: str) -> str:
    """'validation/loss_by_noise_t0_250' for 'validation_loss_t0_250', 'speed/images_per_s' for 'images_per_s', ..."""
    if name == VALIDATION:
        return "validation/loss"
    if name.startswith(f"{VALIDATION}_"):
        return f"validation/loss_by_noise_{name.removeprefix(f'{VALIDATION}_')}"
    if name.partition("_")[0] == SCORE:
        return f"score/{name}"
    return f"{'train' if name in TRAIN else 'speed'}/{name}"


def run_name(options: LoggingOptions, output_dir: Path) -> str:
    """`--tracker_run_name`, by default the name of the output folder."""
    return options.tracker_run_name or output_dir.resolve().name


def start_trackers(accelerator: Accelerator, options: LoggingOptions, output_dir: Path) -> None:
    """Start the tracker that `accelerator` was created with and log the options, except for secret ones.

    Trackers write on the main process only; call this there.

    Raises:
        UserError: the tracker does not start, for example because Weights & Biases is not logged in.
    """
    settings = {key: value for key, value in asdict(options).items() if key not in SECRET_OPTIONS}
    settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
    name, arguments = run_name(options, output_dir), {}
    if options.logger == "wandb":
        folder = Path(os.environ.get("WANDB_DIR", output_dir / options.logging_dir))
        folder.mkdir(parents=True, exist_ok=True)
        arguments = {"wandb": {"dir": str(folder), "name": name}}
    if options.logger == "trackio":
        arguments = {"trackio": {"name": name}}
    for secret in filter(None, (getattr(options, name, None) for name in SECRET_OPTIONS)):
        sys.argv[:] = [word.replace(secret, "***") for word in sys.argv]  # wandb stores the command line
    # Accelerate takes a project of wandb and trackio, and the folder of a run of TensorBoard
    project = name if options.logger == "tensorboard" else options.tracker_project_name
    try:
        accelerator.init_trackers(project, config=settings, init_kwargs=arguments)
    except Exception as error:  # each package raises its own
        raise _cannot_start(options.logger, error) from None


def where_to_look(options: LoggingOptions, output_dir: Path) -> str:
    """How to see what the tracker records, for the summary at the start."""
    folder, name = output_dir / options.logging_dir, run_name(options, output_dir)
    return {
        "none": f"none; {output_dir}/metrics.jsonl has every value",
        "tensorboard": f"tensorboard --logdir {folder}",
        "wandb": f"wandb project {options.tracker_project_name}, run {name} (files: {folder})",
        "trackio": f"trackio show --project {options.tracker_project_name}",
    }[options.logger]
