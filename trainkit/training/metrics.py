"""What a run writes down about itself: metrics.jsonl, the tracker, the progress bar, loss.png."""

import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from tqdm.auto import tqdm

from trainkit.training.throughput import Throughput
from trainkit.training.trackers import start_trackers

METRICS_FILE = "metrics.jsonl"


def read_metrics(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl: one an optimizer step (with `loss`), and one a validation or score between them.

    A last line cut short by a kill is left out.
    """
    path = output_dir / METRICS_FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def truncate_metrics(output_dir: Path, last_step: int) -> None:
    """Drop the lines after optimizer step `last_step`, which a resumed run is about to write again."""
    if not (output_dir / METRICS_FILE).exists():
        return
    rows = [row for row in read_metrics(output_dir) if row["step"] <= last_step]
    temporary = output_dir / f".{METRICS_FILE}.tmp"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, output_dir / METRICS_FILE)


def _plain(row: dict) -> dict:
    """JSON knows no NaN and no infinity: null stands for both."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }


def plot_loss(output_dir: Path) -> None:
    """Draw loss.png: each optimizer step's loss, its running mean, the validation losses, and the learning rate."""
    lines = read_metrics(output_dir)
    rows = [row for row in lines if "loss" in row]
    if not rows:
        return
    held_out = [(row["step"], row["validation_loss"]) for row in lines if "validation_loss" in row]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, losses = np.array([row["step"] for row in rows]), np.array([row["loss"] for row in rows], dtype=float)
    window = max(1, len(losses) // 50)
    sums = np.cumsum(np.insert(np.nan_to_num(losses, nan=np.nanmean(losses)), 0, 0.0))
    means = (sums[window:] - sums[:-window]) / window
    figure, loss_axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    loss_axis.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.6, label="loss of a step")
    loss_axis.plot(steps[window - 1 :], means, color="tab:blue", label=f"mean of {window} steps")
    if held_out:
        loss_axis.plot(*zip(*held_out, strict=True), "o", color="tab:red", markersize=4, label="validation loss")
    loss_axis.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    rate_axis = loss_axis.twinx()
    rate_axis.plot(steps, [row["lr"] for row in rows], color="tab:orange", linewidth=1, label="learning rate")
    rate_axis.set(ylabel="learning rate", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    temporary = output_dir / ".loss.tmp.png"
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, output_dir / "loss.png")


class StepLog:
    """The log of the optimizer steps: kept on the device, read and written down only by `flush`, on all ranks."""

    def __init__(
        self, options, accelerator: Accelerator, output_dir: Path, global_batch_size: int, throughput: Throughput
    ):
        self.accelerator, self.output_dir, self.global_batch_size = accelerator, output_dir, global_batch_size
        self.throughput, self.progress = throughput, None
        self._pending: list[tuple[int, torch.Tensor, float, torch.Tensor]] = []
        self._tracked = options.logger != "none"
        if self._tracked:
            start_trackers(accelerator, options, output_dir)

    def start(self, step: int, max_train_steps: int) -> None:
        """Start the clock and the progress bar at optimizer step `step`."""
        self._window_start, self._window_step, self._window_wait_s = time.perf_counter(), step, 0.0
        self._max_train_steps = max_train_steps
        hidden = not self.accelerator.is_local_main_process
        self.progress = tqdm(total=max_train_steps, initial=step, desc="training", unit="step", disable=hidden)

    def add(self, step: int, loss: torch.Tensor, learning_rate: float, grad_norm: torch.Tensor) -> None:
        """Note one optimizer step without reading anything from the device."""
        self._pending.append((step, loss, learning_rate, grad_norm))
        self.progress.update(1)

    def pause(self, seconds: float) -> None:
        """Leave `seconds` of sampling or saving out of the training speed."""
        self._window_start += seconds

    def flush(self, wait_s: float) -> list[tuple[int, float]]:
        """Average the pending losses over processes and write them down; `wait_s`: seconds waited for data so far.

        Returns step and gradient norm of each, on all ranks.
        """
        if not self._pending:
            return []
        steps, losses, rates, norms = zip(*self._pending, strict=True)
        self._pending = []
        losses = self.accelerator.reduce(torch.stack(losses), "mean").tolist()
        norms = torch.stack([torch.as_tensor(norm) for norm in norms]).tolist()
        seconds = max(time.perf_counter() - self._window_start, 1e-9)
        steps_per_s = (steps[-1] - self._window_step) / seconds
        images_per_s = steps_per_s * self.global_batch_size
        eta_s = (self._max_train_steps - steps[-1]) / steps_per_s
        wait_share = (wait_s - self._window_wait_s) / seconds
        self._window_start, self._window_step, self._window_wait_s = time.perf_counter(), steps[-1], wait_s
        rows = [
            {"step": step, "images": step * self.global_batch_size, "loss": loss, "lr": rate, "grad_norm": norm}
            for step, loss, rate, norm in zip(steps, losses, rates, norms, strict=True)
        ]
        rows[-1] |= self.throughput.values(images_per_s) | {"data_wait_share": round(wait_share, 4)}
        if self.accelerator.scaler is not None:
            rows[-1]["loss_scale"] = self.accelerator.scaler.get_scale()
        rows[-1]["eta_s"] = round(eta_s, 1)
        if self.accelerator.is_main_process:
            self._write(rows)
        self.progress.set_postfix_str(
            f"loss {sum(losses) / len(losses):.4f}, lr {rates[-1]:.2e}, {images_per_s:.0f} images/s, "
            f"data wait {wait_share:.1%}"
        )
        return list(zip(steps, norms, strict=True))

    def values(self, step: int, values: dict[str, float | str]) -> None:
        """Write down what was measured at optimizer step `step` on a line of its own; numbers go to the trackers."""
        if self.accelerator.is_main_process:
            self._write([{"step": step} | values])

    def last_step(self, name: str) -> int | None:
        """The last optimizer step with a value `name` in metrics.jsonl, if any; call it on all ranks."""
        rows = read_metrics(self.output_dir) if self.accelerator.is_main_process else []
        steps = [row["step"] for row in rows if name in row]
        return broadcast_object_list([max(steps, default=None)])[0]

    def _write(self, rows: list[dict]) -> None:
        try:
            with (self.output_dir / METRICS_FILE).open("a") as file:
                file.writelines(json.dumps(_plain(row)) + "\n" for row in rows)
            for row in rows if self._tracked else ():
                numbers = {k: v for k, v in row.items() if k != "step" and not isinstance(v, str)}
                self.accelerator.log(numbers, step=row["step"])
        except OSError as error:  # a full disk must not end the training
            print(f"\nWARNING: {METRICS_FILE} could not be written: {error.strerror}", file=sys.stderr, flush=True)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Send a picture to the trackers that take some."""
        for tracker in self.accelerator.trackers:
            if not hasattr(tracker, "log_images"):  # trackio
                continue
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(image.convert("RGB"))[None]}, step=step, **layout)

    def close(self) -> None:
        self.progress.close()
