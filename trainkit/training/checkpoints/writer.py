"""Write a run's checkpoints: every rank stages its part, the main process commits, optionally in the background."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate import Accelerator

from trainkit.processes import wait_for_everyone
from trainkit.training.checkpoints import folder as checkpoints
from trainkit.training.checkpoints.host_copies import HostCopies
from trainkit.training.checkpoints.state import Snapshot, write_random_states, write_snapshot


class CheckpointWriter:
    """Writes one checkpoint at a time. Call every method on all ranks.

    In the background, training only waits for the copy to the CPU. A failure is reported at the next checkpoint or by
    `wait`. `guard(what)` wraps every write and turns a full disk into a warning.
    """

    def __init__(
        self,
        output_dir: Path,
        accelerator: Accelerator,
        total_limit: int | None,
        in_background: bool,
        guard: Callable[[str], AbstractContextManager],
    ):
        self.output_dir, self.accelerator, self.total_limit, self.guard = output_dir, accelerator, total_limit, guard
        self.saved_step: int | None = None  # of the newest checkpoint known to be complete
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if in_background else None
        self._pending: tuple[int, Future | None] | None = None
        self._copies: HostCopies | None = None  # of the newest checkpoint, until the next update

    def save(self, step: int, take_snapshot: Callable[[], Snapshot]) -> None:
        """Start to write checkpoint-<step>; without a background thread, also wait for it."""
        self.wait()
        staging, is_main = checkpoints.staging_folder(self.output_dir, step), self.accelerator.is_main_process
        name, staged = f"{checkpoints.PREFIX}{step}", False
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
        wait_for_everyone()
        with self.guard(name):
            staging.mkdir(parents=True, exist_ok=True)
            write_random_states(staging, self.accelerator.process_index)
            staged = True
        if not self._on_all_ranks(staged):
            if is_main:
                shutil.rmtree(staging, ignore_errors=True)
            return
        snapshot = take_snapshot()
        self._copies = snapshot.copies
        future = None
        if is_main:
            future = self._run(lambda: self._write(snapshot, staging, self.output_dir / name))
        self._pending = step, future
        if self._executor is None:
            self.wait()

    def before_update(self) -> None:
        """Call it before weights, averages or the optimizer's state change: copies of them may still be running."""
        if self._copies is not None:
            self._copies.before_update()
            self._copies = None

    def wait(self) -> None:
        """Wait until the pending checkpoint is complete or has failed; all ranks learn which."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        complete = future is None
        if future is not None:
            with self.guard(f"{checkpoints.PREFIX}{step}"):
                future.result()
                complete = True
        if self._on_all_ranks(complete):
            self.saved_step = step

    @property
    def complete_step(self) -> int | None:
        """The step of the newest complete checkpoint, also of one whose end nobody waited for; on the main process."""
        if self._pending is not None:
            step, future = self._pending
            if future is not None and future.done() and future.exception() is None:
                return step
        return self.saved_step

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()

    def _run(self, work: Callable[[], None]) -> Future:
        if self._executor is not None:
            return self._executor.submit(work)
        future: Future = Future()
        try:
            work()
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)
        return future

    def _write(self, snapshot: Snapshot, staging: Path, final: Path) -> None:
        try:
            write_snapshot(snapshot, staging)
            checkpoints.commit(staging, final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        checkpoints.rotate(self.output_dir, self.total_limit, final)

    def _on_all_ranks(self, value: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return value
        wait_for_everyone()  # files may take longer than a collective
        failures = torch.tensor([0 if value else 1], device=self.accelerator.device)
        return self.accelerator.reduce(failures, "sum").item() == 0
