"""Power-function averages in addition to the EMA, and their snapshots (Karras et al. 2024, section 3).

ema_snapshots/step-500-sigma_rel-0.05.safetensors     parameters in float16, buffers unchanged

`reconstruct_ema.py` computes the average of any length from them. float16 is precise enough: on the weights of a small
UNet the reconstruction is off by 2e-4 of their norm (bfloat16: 1.6e-3).
"""

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from safetensors.torch import save_file

from trainkit.atomic import TEMPORARY_PREFIX, replacing
from trainkit.diffusion.power_profiles import decay_at, gamma_of
from trainkit.errors import UserError
from trainkit.options.script import TrainingOptions
from trainkit.processes import wait_for_everyone
from trainkit.training.averages.ema import ShardedEMA
from trainkit.training.checkpoints.state import EMA, read_training_state

FOLDER, NAME = "ema_snapshots", re.compile(r"step-(\d+)-sigma_rel-(\d+(?:\.\d+)?(?:e-\d+)?)\.safetensors")


def check_ema_power_lengths(options: TrainingOptions) -> None:
    """Raise `UserError` for invalid `--ema_power_lengths` or `--ema_snapshot_steps`."""
    lengths, steps = options.ema_power_lengths, options.ema_snapshot_steps
    if lengths is None and steps is None:
        return
    if lengths is None or steps is None:
        given, missing = "--ema_power_lengths", "--ema_snapshot_steps 1000"
        if lengths is None:
            given, missing = "--ema_snapshot_steps", "--ema_power_lengths 0.05 0.1"
        raise UserError(f"{given} also needs the other flag, for example {missing}")
    if steps < 1:
        raise UserError(f"--ema_snapshot_steps {steps} must be at least 1")
    if options.optimizer == "schedule_free_adamw":
        raise UserError("--optimizer schedule_free_adamw averages the weights itself: remove --ema_power_lengths")
    for length in lengths:
        try:
            gamma_of(length)
        except ValueError as error:
            raise UserError(f"--ema_power_lengths {error}") from None
    if len(set(_format(lengths).split())) < len(lengths):
        raise UserError(f"--ema_power_lengths {_format(lengths)} lists a length twice")


def snapshot_file(output_dir: Path, step: int, sigma_rel: float) -> Path:
    return output_dir / FOLDER / f"step-{step}-sigma_rel-{sigma_rel:g}.safetensors"


def snapshot_files(output_dir: Path) -> dict[Path, int]:
    """The snapshots in a run's folder and the step of each, in the order of steps."""
    matches = [NAME.fullmatch(path.name) for path in (output_dir / FOLDER).glob("step-*")]
    found = sorted((int(match[1]), float(match[2]), match[0]) for match in matches if match)
    return {output_dir / FOLDER / name: step for step, _, name in found}


class PowerAverage(ShardedEMA):
    """The power-function average of `model`'s parameters with relative length `sigma_rel`, float32, sharded or not.

    After t steps it is the exact weighted sum of the t states of the parameters, where state i has the weight
    (i / t) ** (gamma + 1) - ((i - 1) / t) ** (gamma + 1).
    """

    def __init__(self, model: torch.nn.Module, sigma_rel: float):
        super().__init__(model)
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)

    def decay_at(self, step: int) -> float:
        """The decay of optimizer step `step`, from 1: (1 - 1 / step) ** (gamma + 1)."""
        return decay_at(step, self.gamma)

    def state_dict(self) -> dict[str, float]:
        return {"sigma_rel": self.sigma_rel, "optimization_step": self.optimization_step}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Raises `ValueError` for the state of another length."""
        if state["sigma_rel"] != self.sigma_rel:
            raise ValueError(f"found an average of sigma_rel {state['sigma_rel']}, expected {self.sigma_rel}")
        self.optimization_step = int(state["optimization_step"])


class PowerAverages:
    """The averages of `--ema_power_lengths` and their snapshots. Call every method on all ranks.

    Snapshots are written in the background if checkpoints are. `guard(what)` wraps every write and turns a full disk
    into a warning. `candidates` are the checkpoints that the run may resume from.

    Raises:
        UserError: the checkpoint tracks other lengths. An average cannot be completed for steps it has not seen.
    """

    def __init__(
        self,
        options: TrainingOptions,
        accelerator: Accelerator,
        model: UNet2DModel,
        global_batch_size: int,
        last_step: int,
        candidates: list[Path],
        guard: Callable[[str], AbstractContextManager],
    ):
        lengths = sorted(options.ema_power_lengths or [])
        if candidates:
            _check_lengths_of(candidates[0], lengths)
        self.model, self.output_dir, self.guard = model, Path(options.output_dir), guard
        self.is_main, self.global_batch_size = accelerator.is_main_process, global_batch_size
        self.every, self.last_step = options.ema_snapshot_steps, last_step
        self.averages = [PowerAverage(model, length) for length in lengths]
        self._executor, self._waits = ThreadPoolExecutor(1, thread_name_prefix="ema"), not options.async_checkpointing
        self._pending: tuple[str, Future] | None = None

    @property
    def by_folder(self) -> dict[str, PowerAverage]:
        """The averages by their folder in a checkpoint."""
        return {f"{EMA}_{average.sigma_rel:g}": average for average in self.averages}

    def step(self) -> None:
        """Update every average with the current parameters."""
        for average in self.averages:
            average.step()

    def start(self, step: int) -> None:
        """Make the folder what an uninterrupted run would have at `step`.

        Deletes later snapshots, and the final one of a run that is now longer. Writes the snapshot of `step` again,
        because the run may have been killed between its checkpoint and its snapshot.
        """
        if self.is_main:
            for path in (self.output_dir / FOLDER).glob(f"{TEMPORARY_PREFIX}*"):
                path.unlink()
            for path, of_step in snapshot_files(self.output_dir).items():
                if of_step > step or (of_step == step and not self._due(step)):
                    path.unlink()
        if step:
            self.snapshot(step)

    def snapshot(self, step: int) -> float:
        """Start to write the averages of `step` if it is due; returns the seconds that training waited for it."""
        if not self._due(step):
            return 0.0
        started = time.perf_counter()
        self.wait()
        names = {name for name, _ in self.model.named_parameters()}
        weights = {
            average.sigma_rel: {
                name: _half(value) if name in names else value for name, value in average.full_weights().items()
            }
            for average in self.averages
        }
        if self.is_main:
            self._pending = f"ema_snapshot-{step}", self._executor.submit(self._write, step, weights)
        if self._waits:
            self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the pending snapshot is complete or has failed. Call it on every rank."""
        if self._pending is not None:
            (name, future), self._pending = self._pending, None
            with self.guard(name):
                future.result()
        if self.averages:
            wait_for_everyone()

    def close(self) -> None:
        self._executor.shutdown()

    def _due(self, step: int) -> bool:
        return bool(self.averages) and (step == self.last_step or (self.every is not None and step % self.every == 0))

    def _write(self, step: int, averages: dict[float, dict[str, torch.Tensor]]) -> None:
        metadata = {
            "format": "pt",
            "step": str(step),
            "images": str(step * self.global_batch_size),
            "global_batch_size": str(self.global_batch_size),
            "config": json.dumps(json.loads(self.model.to_json_string())),
        }
        (self.output_dir / FOLDER).mkdir(exist_ok=True)
        for sigma_rel, weights in averages.items():
            with replacing(snapshot_file(self.output_dir, step, sigma_rel), flush=True) as temporary:
                save_file(weights, temporary, metadata=metadata | {"sigma_rel": repr(sigma_rel)})


def _check_lengths_of(checkpoint: Path, lengths: list[float]) -> None:
    saved = sorted(read_training_state(checkpoint)["options"].get("ema_power_lengths") or [])
    if saved != lengths:
        fix = f"use --ema_power_lengths {_format(saved)}" if saved else "remove the flag"
        raise UserError(
            f"--ema_power_lengths {_format(lengths) or 'is missing'}: {checkpoint} tracks {_format(saved) or 'none'}, "
            f"and an average cannot start or end in the middle of a run: {fix}"
        )


def _format(lengths: list[float]) -> str:
    return " ".join(f"{length:g}" for length in lengths)


def _half(value: torch.Tensor) -> torch.Tensor:
    """`value` in float16, or unchanged if it exceeds the range of float16."""
    return value.half() if value.numel() and value.abs().max() <= torch.finfo(torch.float16).max else value
