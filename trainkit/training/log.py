"""The log of a run: metrics.jsonl, the experiment tracker, the progress and loss.png."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from trainkit.atomic import replacing, write_text
from trainkit.options.training import LoggingOptions
from trainkit.processes import on_main_process
from trainkit.report.metrics import METRICS_FILE
from trainkit.terminal import Progress, warn
from trainkit.training.throughput import CoreWait, Throughput
from trainkit.training.trackers import start_trackers, tracked_values

SLOW_DATA = 0.1  # the share of waiting time from which the progress names it
FEW_CORES = 0.25  # the same of waiting for a core: 0.02 on a machine without other work, 0.1 with little


def read_metrics(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl: one per optimizer step (with `loss`) and one per validation or score.

    A last line that was cut off by a kill is skipped.
    """
    path = output_dir / METRICS_FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def truncate_metrics(output_dir: Path, last_step: int) -> None:
    """Remove the lines after optimizer step `last_step`, which a resumed run will write again."""
    if (output_dir / METRICS_FILE).exists():
        rows = [row for row in read_metrics(output_dir) if row["step"] <= last_step]
        write_text(output_dir / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows))


def plot_loss(output_dir: Path) -> None:
    """Draw loss.png: the loss of each optimizer step, its running mean, the validation loss and the learning rate."""
    lines = read_metrics(output_dir)
    rows = [row for row in lines if "loss" in row]
    if not rows:
        return
    held_out = [(row["step"], row["validation_loss"]) for row in lines if "validation_loss" in row]
    from matplotlib.figure import Figure

    steps, losses = np.array([row["step"] for row in rows]), np.array([row["loss"] for row in rows], dtype=float)
    window = max(1, len(losses) // 50)
    sums = np.cumsum(np.insert(np.nan_to_num(losses, nan=np.nanmean(losses)), 0, 0.0))
    means = (sums[window:] - sums[:-window]) / window
    figure = Figure(figsize=(8, 4.5))
    figure.subplots_adjust(left=0.11, right=0.87, bottom=0.12, top=0.9)  # as a layout engine would, in half the time
    loss_axis = figure.add_subplot(xlabel="optimizer step", ylabel="loss", yscale="log")
    loss_axis.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.6, label="loss per step")
    loss_axis.plot(steps[window - 1 :], means, color="tab:blue", label=f"mean of {window} steps")
    if held_out:
        loss_axis.plot(*zip(*held_out, strict=True), "o", color="tab:red", markersize=4, label="validation loss")
    rate_axis = loss_axis.twinx()
    rate_axis.plot(steps, [row["lr"] for row in rows], color="tab:orange", linewidth=1, label="learning rate")
    rate_axis.set(ylabel="learning rate", ylim=(0, None))
    figure.legend(loc="upper center", ncols=4, frameon=False)
    with replacing(output_dir / "loss.png") as temporary:
        figure.savefig(temporary, dpi=120)


class StepLog:
    """The log of optimizer steps. Values stay on the device until `flush` reads and writes them, on all ranks."""

    def __init__(
        self,
        options: LoggingOptions,
        accelerator: Accelerator,
        output_dir: Path,
        global_batch_size: int,
        throughput: Throughput,
    ):
        self.accelerator, self.output_dir, self.global_batch_size = accelerator, output_dir, global_batch_size
        self.throughput, self.progress = throughput, Progress("training", 0, "steps", hidden=True)  # until `start`
        self._pending: list[tuple[int, torch.Tensor, float, float | torch.Tensor]] = []
        self.show_progress = True
        self._tracked = options.logger != "none"
        if self._tracked:
            on_main_process(lambda: start_trackers(accelerator, options, output_dir))  # some use the network

    def start(self, step: int, max_train_steps: int) -> None:
        """Start the clock and the progress at optimizer step `step`."""
        self._window_start, self._window_step, self._window_wait_s = time.perf_counter(), step, 0.0
        on_cpu = self.accelerator.device.type == "cpu"
        self._core_wait = CoreWait() if on_cpu and torch.get_num_threads() > 1 else None
        self._max_train_steps = max_train_steps
        self._details, self._left_s = "", None  # of the last flush
        self.progress = Progress("training", max_train_steps, "steps", step, hidden=not self.show_progress)

    def add(self, step: int, loss: torch.Tensor, learning_rate: float, grad_norm: float | torch.Tensor) -> None:
        """Record one optimizer step without reading anything from the device."""
        self._pending.append((step, loss, learning_rate, grad_norm))
        if step < self._max_train_steps:  # the last one is shown with its loss
            self.progress.update(step, self._details, self._left_s)

    def pause(self, seconds: float) -> None:
        """Exclude `seconds` of sampling or saving from the training speed."""
        self._window_start += seconds

    def flush(self, wait_s: float) -> list[tuple[int, float]]:
        """Average the pending losses over processes and write them; `wait_s` is the seconds waited for data so far.

        Returns the step and gradient norm of each pending step, on all ranks.
        """
        if not self._pending:
            return []
        steps, losses, rates, norms = zip(*self._pending, strict=True)
        self._pending = []
        means: list[float] = self.accelerator.reduce(torch.stack(losses), "mean").tolist()
        grad_norms: list[float] = torch.stack([torch.as_tensor(norm) for norm in norms]).tolist()
        rows = [
            {"step": step, "images": step * self.global_batch_size, "loss": loss, "lr": rate, "grad_norm": norm}
            for step, loss, rate, norm in zip(steps, means, rates, grad_norms, strict=True)
        ]
        rows[-1] |= self._speed(steps[-1], wait_s)
        if self.accelerator.is_main_process:
            self._write(rows)
        self._details = (
            f"loss {sum(means) / len(means):.4f}, lr {rates[-1]:.2e}, {rows[-1]['images_per_s']:.3g} images/s"
        )
        if rows[-1]["data_wait_share"] > SLOW_DATA:
            self._details += f", {rows[-1]['data_wait_share']:.0%} of the time waiting for data"
        if rows[-1].get("core_wait_share", 0) > FEW_CORES:
            self._details += f", {rows[-1]['core_wait_share']:.0%} of the time waiting for cores (--cpu_threads)"
        self._left_s = rows[-1]["eta_s"]
        self.progress.update(steps[-1], self._details, self._left_s)
        return list(zip(steps, grad_norms, strict=True))

    def _speed(self, step: int, wait_s: float) -> dict[str, float]:
        """Throughput, data wait and remaining time since the last flush; starts the next window."""
        seconds = max(time.perf_counter() - self._window_start, 1e-9)
        steps_per_s = (step - self._window_step) / seconds
        wait_share = (wait_s - self._window_wait_s) / seconds
        self._window_start, self._window_step, self._window_wait_s = time.perf_counter(), step, wait_s
        values = self.throughput.values(steps_per_s * self.global_batch_size)
        values["data_wait_share"] = round(wait_share, 4)
        core_wait_share = self._core_wait.share() if self._core_wait else None
        if core_wait_share is not None:
            values["core_wait_share"] = round(core_wait_share, 4)
        if self.accelerator.scaler is not None:
            values["loss_scale"] = self.accelerator.scaler.get_scale()
        values["eta_s"] = round((self._max_train_steps - step) / steps_per_s, 1)
        return values

    def write_values(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write what was measured at optimizer step `step` as a line of its own; numbers also go to the trackers."""
        if self.accelerator.is_main_process:
            self._write([{"step": step, **values}])

    def last_step(self, name: str) -> int | None:
        """The last optimizer step with a value `name` in metrics.jsonl, if any; call it on all ranks."""
        return on_main_process(
            lambda: max((row["step"] for row in read_metrics(self.output_dir) if name in row), default=None)
        )

    def _write(self, rows: list[dict]) -> None:
        try:
            with (self.output_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(_to_json(row)) + "\n" for row in rows)
            with _one_flush(self.accelerator.trackers if self._tracked else []):
                for row in rows if self._tracked else ():
                    values = tracked_values(row, self.accelerator.num_processes)
                    self.accelerator.log(values, step=row["step"])
        except OSError as error:  # a full disk must not end the training
            warn(f"{METRICS_FILE} cannot be written: {error.strerror}")

    def write_image(self, name: str, image: Image.Image, step: int) -> None:
        """Send a picture to the trackers that accept images."""
        for tracker in self.accelerator.trackers:
            if not hasattr(tracker, "log_images"):  # trackio
                continue
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(image.convert("RGB"))[None]}, step=step, **layout)

    def close(self) -> None:
        self.progress.close()


@contextlib.contextmanager
def _one_flush(trackers: list) -> Iterator[None]:
    """Flush TensorBoard's file once after the block; Accelerate's tracker does so for each step that it is given."""
    writers = [tracker.writer for tracker in trackers if tracker.name == "tensorboard"]
    for writer in writers:
        writer.flush = lambda: None  # hides the method of the class
    try:
        yield
    finally:
        for writer in writers:
            del writer.flush
            writer.flush()


def _to_json(row: dict) -> dict:
    """JSON has no NaN and no infinity: both become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
