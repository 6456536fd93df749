"""Find a learning rate for these images, this network and this batch: a short run whose rate rises until it fails.

The loss is not that of the training batches, which varies with their timesteps, but that of a fixed probe of images,
noise and evenly spread timesteps after each step. So a hundred steps give a readable curve (the range test of Smith
2017 with this probe). Nothing is kept: a later run is the same as without the search.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from trainkit.atomic import replacing, write_json
from trainkit.data.loading.loader import Batch
from trainkit.errors import UserError
from trainkit.options.training import OptimizationOptions
from trainkit.terminal import tell
from trainkit.training.run import Run

LEAST_RATE, MOST_RATE, STEPS = 1e-6, 1.0, 120  # 20 steps per factor of ten
PROBE_IMAGES = 64  # at least, over all processes
FAILED = 1.5  # stop when the loss exceeds this times the lowest loss so far
FALL = 0.8  # the suggested rate is the smallest one at which the logarithm of the loss has this share of its fall
FILE = "learning_rate.json"


def check_learning_rate_search(options: OptimizationOptions) -> None:
    """Raise `UserError` if `--find_learning_rate` has nothing to find."""
    if options.find_learning_rate and options.optimizer == "prodigy":
        raise UserError("--find_learning_rate: --optimizer prodigy finds the rate itself; leave the flag out")


def find_learning_rate(run: Run, loss_of: Callable[[torch.nn.Module, Batch], torch.Tensor]) -> float:
    """Sweep the learning rate of `run`; print, plot and return the suggested one. Do not train `run` afterwards.

    `loss_of(model, batch)` is the scalar loss of training. Writes learning_rate.json (rates, losses, the suggestion)
    and learning_rate.png into --output_dir, and no checkpoint. A collective.
    """
    probe = _probe(run)
    rates, losses = [], []
    run.model.train()
    for rate, batches in zip(np.geomspace(LEAST_RATE, MOST_RATE, STEPS).tolist(), _steps(run), strict=True):
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        _step(run, batches, loss_of)
        loss = _probe_loss(run, probe, loss_of)
        rates.append(rate)
        losses.append(loss)
        if not math.isfinite(loss) or loss > max(losses[0], FAILED * min(losses)):
            break
    suggestion = suggested_rate(rates, losses)
    if run.accelerator.is_main_process:
        with run.writing(FILE):
            _write(run, rates, losses, suggestion)
    tell(
        f"--learning_rate {suggestion:.2g} is a good start for --optimizer {run.options.optimizer}; the curve is "
        f"in {run.output_dir / 'learning_rate.png'}. Nothing was trained: run again without --find_learning_rate"
    )
    run.close()
    return suggestion


def suggested_rate(rates: list[float], losses: list[float]) -> float:
    """The rate suggested by a sweep: the smallest one near the lowest smoothed loss, rounded to one digit.

    Beyond that rate the curve is flat and noisy up to where it diverges, so the position of the lowest loss itself
    varies by a factor of ten between seeds. Raises `UserError` if the loss never fell.
    """
    smooth = _smoothed([loss if math.isfinite(loss) else float("inf") for loss in losses])
    lowest = int(np.argmin(smooth))
    if not smooth[lowest] < 0.98 * losses[0]:
        raise UserError(
            f"--find_learning_rate: the loss ({losses[0]:.3f}) fell at no rate from {rates[0]:g} to {rates[-1]:g}; "
            "leave the flag out, or, with --pretrained_model_name_or_path, start from --learning_rate 2e-5"
        )
    enough = losses[0] ** (1 - FALL) * smooth[lowest] ** FALL
    suggested = next(rate for rate, loss in zip(rates, smooth, strict=True) if loss <= enough)
    return float(f"{suggested:.0e}")


def _smoothed(losses: list[float]) -> np.ndarray:
    """The median of five neighbours: one lucky step is not a minimum."""
    padded = np.pad(np.asarray(losses), 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)


def _steps(run):
    """The micro-batches of each of `STEPS` optimizer steps from the run's own on, as training would see them."""
    micro_steps, batches = run.shape.micro_steps, []
    for batch in run.loader.iterate(run.step, run.step + STEPS):
        batches.append(batch)
        if len(batches) == micro_steps:
            yield batches
            batches = []


def _probe(run) -> list[Batch]:
    """The micro-batches of the steps after the sweep, with timesteps evenly spread over all of them."""
    first, size = run.step + STEPS, run.shape.global_size
    steps = math.ceil(PROBE_IMAGES / size)
    places = (torch.arange(steps * size, dtype=torch.float64) + 0.5) / (steps * size)
    batches = []
    for number, batch in enumerate(run.loader.iterate(first, first + steps)):
        uniforms = places[number // run.shape.micro_steps :: steps][run.shape.rows(batch.micro_step)]
        batches.append(replace(batch, uniforms=uniforms))
    return batches


def _probe_loss(run, probe: list[Batch], loss_of) -> float:
    """The mean over all of them, on every process."""
    with torch.no_grad():
        losses = torch.stack([loss_of(run.model, batch).float() for batch in probe])
        return run.accelerator.reduce(losses.mean(), "mean").item()


def _step(run, batches: list[Batch], loss_of) -> None:
    for number, batch in enumerate(batches):
        with run.no_gradient_sync() if number < len(batches) - 1 else contextlib.nullcontext():
            run.accelerator.backward(loss_of(run.model, batch))
    run.accelerator.clip_grad_norm_(run.unet.parameters(), run.options.max_grad_norm or math.inf)
    run.optimizer.step()
    run.optimizer.zero_grad()


def _write(run, rates: list[float], losses: list[float], suggestion: float) -> None:
    found = {
        "learning_rate": suggestion,
        "optimizer": run.options.optimizer,
        "global_batch_size": run.shape.global_size,
        "rates": rates,
        "losses": [loss if math.isfinite(loss) else None for loss in losses],
    }
    write_json(run.output_dir / FILE, found)
    _plot(run.output_dir / "learning_rate.png", rates, losses, suggestion)


def _plot(file, rates: list[float], losses: list[float], suggestion: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="learning rate", ylabel="loss of the probe", xscale="log")
    axes.plot(rates, losses)
    axes.axvline(suggestion, color="red", label=f"{suggestion:.2g}")
    axes.set_ylim(0, 1.2 * losses[0])
    axes.legend()
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=100)
