"""What a run in progress tells its report and its card about itself."""

import os
import time
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch

from trainkit.data.loading.dataset import PreparedImages
from trainkit.diffusion.conditioning import ImageCondition, preview_scale
from trainkit.options.training import SECRET_OPTIONS
from trainkit.report.metrics import read_rows, training_seconds
from trainkit.report.record import RECORD_NAME, describe_preparation, read_json
from trainkit.report.write import REPORT_NAME, write_report
from trainkit.terminal import only_warn
from trainkit.training.energy import INTERVAL_S, EnergyMeter, local_devices
from trainkit.training.run import Run
from trainkit.versions import git_commit, versions

TITLES = {
    None: "Unconditional", "class_labels": "Class-conditional", "vectors": "Vector-conditional",
    "prompt": "Text-to-image", "image": "Image-to-image",
}  # fmt: skip
LONGEST_CAPTION = 120  # characters


class RunReport:
    """Writes report.json and report.html of `run`, on the main process. `origin` says what a student was made from."""

    def __init__(self, run: Run, held_out: PreparedImages | None, origin: str | None = None):
        self.run, self.held_out, self.origin = run, held_out, origin
        self._started = time.perf_counter()
        earlier = read_json(run.output_dir / RECORD_NAME) if run.step else {}
        # A killed run has trained for longer than it last reported.
        trained_s = training_seconds(read_rows(run.output_dir)) if run.step else None
        self._earlier_s = max(float(earlier.get("wall_time_s") or 0.0), trained_s or 0.0)
        self._energy = EnergyMeter(run.accelerator.device, local_devices(), run.step, earlier.get("energy"))

    def follow(self) -> None:
        """Read the counters of energy from time to time, before they begin again at 0. Call it after each step."""
        self._energy.update(INTERVAL_S)

    def write(self, finished: bool = False) -> None:
        """Write both files; a failure only warns. The time does not count as training."""
        if not self.run.accelerator.is_main_process:
            return
        started = time.perf_counter()
        with only_warn(f"{REPORT_NAME} is not written"):
            write_report(self.run.output_dir, self.record(finished))
        self.run.log.pause(time.perf_counter() - started)

    def record(self, finished: bool = False) -> dict[str, Any]:
        """The content of report.json (trainkit/report/record.py)."""
        run, options = self.run, self.run.options
        return {
            "name": run.output_dir.resolve().name,
            "title": self._title(),
            "origin": self.origin,
            "state": "finished" if finished else "stopped" if run.stopped else "training",
            "updated": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "step": run.step,
            "max_train_steps": run.max_train_steps,
            "global_batch_size": run.shape.global_size,
            "parameters": sum(parameter.numel() for parameter in run.unet.parameters()),
            "wall_time_s": round(self._earlier_s + time.perf_counter() - self._started, 1),
            "hardware": {"description": describe_hardware(run)},
            "energy": self._energy.record(),
            "dataset": describe_images(run.images),
            "held_out": None if self.held_out is None else {"num_images": len(self.held_out)},
            "options": {name: value for name, value in asdict(options).items() if name not in SECRET_OPTIONS},
            "preview": describe_preview(run.condition, options, self.origin),
            "versions": versions(),
            "git_commit": git_commit(),
        }

    def _title(self) -> str:
        run = self.run
        kind = TITLES[None if run.condition is None else run.condition.argument]
        student = "few-step student, " if self.origin else ""
        images = getattr(run.images, "images", run.images)  # of latents: the pixels
        latent = "latent " if run.images.holds_latents else ""
        return f"{kind} {latent}diffusion model, {student}{images.width} × {images.height} pixels"


def describe_hardware(run: Run) -> str:
    """`2 x NVIDIA H100, bf16`."""
    accelerator, name = run.accelerator, run.throughput.device_name
    if name == "cpu":
        name = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
    precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    return f"{accelerator.num_processes} × {name}, {precision}"


def describe_images(images: PreparedImages) -> dict[str, Any]:
    """What is known of the training images."""
    return describe_preparation(images.preparation) | {"folder": str(images.folder)}


def describe_preview(condition: ImageCondition | None, options: Any, origin: str | None) -> dict[str, Any]:
    """How a sample grid is sampled, and its captions in full."""
    count = options.ddpm_num_inference_steps
    how = f", {count} sampling {'step' if count == 1 else 'steps'}"
    if condition is None:
        return {"how": how}
    if preview_scale(options) > 1 and origin is None:
        how += f", guidance {preview_scale(options):g}"
    if condition.argument == "prompt":
        conditions, _ = condition.preview_conditions(options.eval_batch_size, options.seed)
        return {"how": how, "captions": [str(caption)[:LONGEST_CAPTION] for caption in conditions]}
    return {"how": how}
