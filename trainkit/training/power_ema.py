"""Power-function averages beside the ordinary one, and their snapshots (Karras et al. 2024, section 3).

ema_snapshots/step-500-sigma_rel-0.05.safetensors     parameters in float16, buffers as they are

`reconstruct_ema.py` makes the average of any length from them. They are float16, as rounded values are all that the
sum loses: measured on weights of a small UNet, 2e-4 of their norm, where bfloat16 loses 1.6e-3.
"""

import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from trainkit.diffusion.power_profiles import decay_at, gamma_of
from trainkit.errors import UserError
from trainkit.training.ema import ShadowWeights
from trainkit.training.state import EMA, read_facts

FOLDER, NAME = "ema_snapshots", re.compile(r"step-(\d+)-sigma_rel-(\d+(?:\.\d+)?(?:e-\d+)?)\.safetensors")
TEMPORARY = ".tmp-"


def check_power_lengths(options) -> None:
    """Raise `UserError` for `--ema_power_lengths` or `--ema_snapshot_steps` that cannot be."""
    lengths, steps = options.ema_power_lengths, options.ema_snapshot_steps
    if (lengths is None) != (steps is None):
        given, missing = "ema_power_lengths", "ema_snapshot_steps"
        if lengths is None:
            given, missing = missing, given
        raise UserError(f"--{given} needs --{missing} beside it, such as 0.05 0.1 every 1000 steps")
    if lengths is None:
        return
    if steps < 1:
        raise UserError(f"--ema_snapshot_steps {steps} must be at least 1")
    if options.optimizer == "schedule_free_adamw":
        raise UserError("--optimizer schedule_free_adamw averages the weights itself: leave out --ema_power_lengths")
    for length in lengths:
        try:
            gamma_of(length)
        except ValueError as error:
            raise UserError(f"--ema_power_lengths {error}") from None
    if len(set(_told(lengths).split())) < len(lengths):
        raise UserError(f"--ema_power_lengths {_told(lengths)} names a length twice")


def snapshot_file(output_dir: Path, step: int, sigma_rel: float) -> Path:
    return output_dir / FOLDER / f"step-{step}-sigma_rel-{sigma_rel:g}.safetensors"


def snapshot_files(output_dir: Path) -> dict[Path, int]:
    """The snapshots in a run's folder, and the step of each, in the order of steps."""
    matches = [NAME.fullmatch(path.name) for path in (output_dir / FOLDER).glob("step-*")]
    found = sorted((int(match[1]), float(match[2]), match[0]) for match in matches if match)
    return {output_dir / FOLDER / name: step for step, _, name in found}


class PowerAverage(ShadowWeights):
    """The power-function average of `model`'s parameters of the relative length `sigma_rel`, float32, sharded or not.

    After t steps it is the exact weighted sum of the t states of the parameters, of which state i weighs
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
            raise ValueError(f"an average of sigma_rel {state['sigma_rel']} in the place of {self.sigma_rel}")
        self.optimization_step = state["optimization_step"]


class PowerAverages:
    """The averages of `--ema_power_lengths`, and their snapshots; every method is called on all ranks.

    Snapshots are written in the background where checkpoints are. `guard(what)` is around every write and turns a full
    disk into a warning. `candidates` are the checkpoints that the run may be resumed from. Raises `UserError` where
    these were made with other lengths: what an average has missed cannot be made up.
    """

    def __init__(
        self,
        options,
        accelerator: Accelerator,
        model: torch.nn.Module,
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
        """Take in the parameters as they are now."""
        for average in self.averages:
            average.step()

    def begin(self, step: int) -> None:
        """Leave in the folder what the run would have there that was never interrupted, at the step of its checkpoint.

        Later snapshots go, and so does the last one of a run that is now prolonged. One of this very step is written
        again: the run may have been killed between its checkpoint and its snapshot.
        """
        if self.is_main:
            for path in (self.output_dir / FOLDER).glob(f"{TEMPORARY}*"):
                path.unlink()
            for path, of_step in snapshot_files(self.output_dir).items():
                if of_step > step or (of_step == step and not self._due(step)):
                    path.unlink()
        if step:
            self.snapshot(step)

    def snapshot(self, step: int) -> float:
        """Begin to write the averages of `step`, where it is due; returns the seconds that training waited for it."""
        if not self._due(step):
            return 0.0
        started = time.perf_counter()
        self.settle()
        names = {name for name, _ in self.model.named_parameters()}
        taken = {
            average.sigma_rel: {
                name: _half(value) if name in names else value for name, value in average.full_weights().items()
            }
            for average in self.averages
        }
        if self.is_main:
            self._pending = f"ema_snapshot-{step}", self._executor.submit(self._write, step, taken)
            if self._waits:
                self.settle()
        return time.perf_counter() - started

    def settle(self) -> None:
        """Wait until the snapshot that was begun is whole or has failed."""
        if self._pending is not None:
            (name, future), self._pending = self._pending, None
            with self.guard(name):
                future.result()

    def close(self) -> None:
        self._executor.shutdown()

    def _due(self, step: int) -> bool:
        return bool(self.averages) and (step % self.every == 0 or step == self.last_step)

    def _write(self, step: int, taken: dict[float, dict[str, torch.Tensor]]) -> None:
        told = {
            "format": "pt",
            "step": str(step),
            "images": str(step * self.global_batch_size),
            "global_batch_size": str(self.global_batch_size),
            "config": json.dumps(json.loads(self.model.to_json_string())),
        }
        (self.output_dir / FOLDER).mkdir(exist_ok=True)
        for sigma_rel, weights in taken.items():
            _write(weights, snapshot_file(self.output_dir, step, sigma_rel), told | {"sigma_rel": repr(sigma_rel)})


def _check_lengths_of(checkpoint: Path, lengths: list[float]) -> None:
    there = sorted(read_facts(checkpoint)["options"].get("ema_power_lengths") or [])
    if there != lengths:
        fix = f"give --ema_power_lengths {_told(there)}" if there else "leave the flag out"
        raise UserError(
            f"--ema_power_lengths {_told(lengths) or 'is missing'}: {checkpoint} was made with "
            f"{_told(there) or 'none'}, and an average cannot begin or end on the way: {fix}"
        )


def _told(lengths: list[float]) -> str:
    return " ".join(f"{length:g}" for length in lengths)


def _half(value: torch.Tensor) -> torch.Tensor:
    """`value` in float16, or as it is where it is beyond the range of that."""
    return value.half() if value.numel() and value.abs().max() <= torch.finfo(torch.float16).max else value


def _write(weights: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    temporary = file.with_name(f"{TEMPORARY}{file.name}")
    try:
        save_file(weights, temporary, metadata=metadata)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
