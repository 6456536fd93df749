"""Experiment trackers, by Accelerate: refused before training where they cannot work, told the settings, no secret."""

import os
import sys
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator, tracking

from trainkit.errors import UserError
from trainkit.options.training import SECRET_OPTIONS


def check_tracker(logger: str) -> None:
    """Raise `UserError` where the package of `--logger` is not installed; Accelerate would log nothing, silently."""
    if logger != "none" and logger not in map(str, tracking.get_available_trackers()):
        raise UserError(f"--logger {logger}: its package is not installed: pip install {logger}, or --logger none")


def start_trackers(accelerator: Accelerator, options, output_dir: Path) -> None:
    """Start the tracker that `accelerator` was made with, and tell it the options, all but the secret ones.

    Raises `UserError` where it does not start, for instance where Weights & Biases knows no account.
    """
    settings = {key: value for key, value in asdict(options).items() if key not in SECRET_OPTIONS}
    settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
    arguments = {}
    if options.logger == "wandb":
        folder = Path(os.environ.get("WANDB_DIR", output_dir / options.logging_dir))
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
        arguments = {"wandb": {"dir": str(folder)}}
    for secret in filter(None, (getattr(options, name, None) for name in SECRET_OPTIONS)):
        sys.argv[:] = [word.replace(secret, "***") for word in sys.argv]  # wandb stores the command line
    try:
        accelerator.init_trackers(output_dir.resolve().name, config=settings, init_kwargs=arguments)
    except Exception as error:  # each package raises its own
        reason = " ".join(str(error).split())[:300]
        hint = "log in with `wandb login`, or set WANDB_MODE=offline" if options.logger == "wandb" else "repair it"
        raise UserError(f"--logger {options.logger} does not start ({reason}): {hint}, or --logger none") from None
