"""The training run around a loop that the script keeps in sight.

    run = start_run(options, accelerator, unet, images)
    for batch in run.batches():          # from the checkpoint's step to max_train_steps or a stop signal
        run.update(loss)                 # backward; after the last micro-step: clip, step, EMA, log, checkpoint
        if run.due(epochs=10):           # at the end of the optimizer step that completes every tenth epoch
            ...
    run.finish()

Steps are optimizer steps. The global batch of step s and all its randomness are functions of (seed, s) alone.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import UNet2DModel
from filelock import FileLock
from torch.optim.lr_scheduler import LambdaLR

from trainkit import __version__
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.loader import Batch, BatchLoader
from trainkit.diffusion.augmentation_input import without_augmentation_input
from trainkit.diffusion.conditioning import ImageCondition
from trainkit.hub.background import Pushes
from trainkit.options.script import TrainingOptions
from trainkit.options.training import SECRET_OPTIONS
from trainkit.processes import end_together
from trainkit.terminal import say, tell
from trainkit.training.averages.ema import ShardedEMA
from trainkit.training.averages.power_ema import PowerAverages
from trainkit.training.checkpoints.resume import describe_dataset
from trainkit.training.checkpoints.state import EMA, take_snapshot
from trainkit.training.checkpoints.writer import CheckpointWriter
from trainkit.training.device import uncompiled
from trainkit.training.guards import SkippedSteps, WriteGuard, check_replicas, step_if_finite
from trainkit.training.log import StepLog, plot_loss
from trainkit.training.next_step import resume_command, sample_command
from trainkit.training.optimizers import averaged_by_optimizer
from trainkit.training.sharding import gradient_norm_to_tensor, is_sharded, no_gradient_sync, unsharded_copy
from trainkit.training.signals import StopSignals
from trainkit.training.throughput import Throughput


@dataclass
class Run:
    """One training run: the parts that `start_run` builds, and the loop over them.

    `step` counts finished optimizer steps. `model` is what the loss calls; `unet` is the same without wrappers.
    `condition` gives the model's further inputs.
    """

    options: TrainingOptions
    accelerator: Accelerator
    images: PreparedImages
    condition: ImageCondition | None
    model: torch.nn.Module
    unet: UNet2DModel
    optimizer: AcceleratedOptimizer
    lr_scheduler: LambdaLR
    ema: ShardedEMA | None
    power_averages: PowerAverages
    loader: BatchLoader
    checkpoints: CheckpointWriter
    skipped: SkippedSteps
    throughput: Throughput
    writing: WriteGuard
    max_train_steps: int
    settings: Any  # the script's own options, which config.yaml holds
    step: int = 0
    stopped: bool = False  # by a signal
    lock: FileLock | None = None  # of the output folder, on the main process
    pushes: Pushes | None = None  # to the Hub, on the main process
    log: StepLog = field(init=False)  # from `start_log`

    def __post_init__(self) -> None:
        self.shape, self.output_dir = self.loader.shape, self.writing.output_dir
        self.sharded = is_sharded(self.unet)
        self._compiling_since: float | None = None  # in the first micro-step, if the UNet is compiled
        self._micro_step, self._step_loss = 0, torch.zeros((), device=self.accelerator.device)

    # The loop

    def start_log(self) -> None:
        """Start the trackers. Call it after the resume, whose failures they should not record."""
        self.log = StepLog(self.options, self.accelerator, self.output_dir, self.shape.global_size, self.throughput)

    def batches(self) -> Iterator[Batch]:
        """The micro-batches from the current step on, until `max_train_steps` or a stop signal."""
        signals = StopSignals(self.step)
        self.log.start(self.step, self.max_train_steps)
        self.model.train()
        self._compiling_since = None if self.unet._compiled_call_impl is None else time.perf_counter()
        try:
            for batch in self.loader.iterate(self.step, self.max_train_steps):
                self._micro_step = batch.micro_step
                first_row = self.shape.rows(batch.micro_step).start
                torch.manual_seed(hash((self.options.seed, batch.step, first_row)))  # for dropout in the model
                with contextlib.nullcontext() if self.end_of_step else self.no_gradient_sync():
                    yield batch
                if self.end_of_step and self.step < self.max_train_steps and signals.agreed(self.step):
                    self.stopped = True
                    break
            self._write_last_checkpoint()
        finally:
            signals.close()
            self.power_averages.close()
            self.checkpoints.close()
            self.log.close()

    def no_gradient_sync(self) -> contextlib.AbstractContextManager:
        """A context for every micro-step of an optimizer step except the last."""
        return no_gradient_sync(self.unet) if self.sharded else self.accelerator.no_sync(self.model)

    @property
    def end_of_step(self) -> bool:
        """Whether the current micro-step is the last one of its optimizer step."""
        return self._micro_step == self.shape.micro_steps - 1

    def update(self, loss: torch.Tensor) -> None:
        """Backward pass of a micro-step's `loss` (scalar, mean over its images); the last one steps the optimizer."""
        self.accelerator.backward(loss)
        if self._compiling_since is not None:
            self._report_compilation(time.perf_counter() - self._compiling_since)
        self._step_loss += loss.detach() / self.shape.micro_steps
        if not self.end_of_step:
            return
        self.checkpoints.before_update()
        limit = self.options.max_grad_norm or math.inf
        grad_norm = gradient_norm_to_tensor(self.accelerator.clip_grad_norm_(self.unet.parameters(), limit))
        if self.accelerator.scaler is None:
            step_if_finite(self.optimizer.optimizer, torch.as_tensor(grad_norm))
        else:  # fp16: the scaler skips a step whose loss scale was too high
            self.optimizer.step()
        self.optimizer.zero_grad()
        learning_rate = float(self.lr_scheduler.get_last_lr()[0])
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step()
        self.power_averages.step()
        self.step += 1
        self.log.add(self.step, self._step_loss, learning_rate, grad_norm)
        self._step_loss = torch.zeros_like(self._step_loss)
        self._after_step()

    def _report_compilation(self, seconds: float) -> None:
        self._compiling_since = None
        self.log.pause(seconds)
        say(f"compiled the UNet in {seconds:.1f} s (--no_compile: start without)")

    def _after_step(self) -> None:
        """Log, compare replicas and write a checkpoint if they are due."""
        options = self.options
        if self.step % options.logging_steps == 0 or self.step == self.max_train_steps:
            self._flush_log()
        if not self.sharded and options.replica_check_steps and self.step % options.replica_check_steps == 0:
            check_replicas(self.accelerator, self.unet, self.step)
        if options.checkpointing_steps and self.step % options.checkpointing_steps == 0:
            self.save_checkpoint()
        if self.pushes is not None and self.step < self.max_train_steps:  # the last push follows anyway
            self.pushes.push_checkpoint(self.step, self.checkpoints.complete_step)
        self.log.pause(self.power_averages.snapshot(self.step))  # after the checkpoint, which does not wait for it

    def _flush_log(self) -> None:
        scaler = self.accelerator.scaler  # fp16: it finds its scale by letting steps overflow
        for step, grad_norm in self.log.flush(self.loader.wait_s):
            self.skipped.record(step, math.isfinite(grad_norm) or (scaler is not None and scaler.get_scale() >= 1))

    def due(self, steps: int | None = None, epochs: int | None = None) -> bool:
        """Whether the optimizer step that just ended completes `steps` steps or, if that is None, `epochs` epochs."""
        if not self.end_of_step:
            return False
        if steps:
            return self.step % steps == 0
        if not epochs:
            return False
        return self._epochs_done(self.step) // epochs > self._epochs_done(self.step - 1) // epochs

    def _epochs_done(self, step: int) -> int:
        return step * self.shape.global_size // len(self.images)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[UNet2DModel]:
        """The full UNet with its averaged weights (without an EMA: its current ones), for sampling and saving.

        In evaluation mode, on every rank. The time inside does not count as training.
        """
        self._flush_log()  # trackers refuse a step below one they have seen
        self.checkpoints.before_update()
        started = time.perf_counter()
        with averaged_by_optimizer(self.optimizer.optimizer) if self.ema is None else self.ema.swapped_in():
            with without_augmentation_input(self.unet):
                unet = unsharded_copy(self.unet) if self.sharded else self.unet
                unet.eval()
                with uncompiled(unet):
                    yield unet
        self.unet.train()
        self.log.pause(time.perf_counter() - started)

    def close(self, another_follows: bool = False) -> None:
        """End the trackers and, unless another run follows in this process, the process group; free the folder."""
        if another_follows:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.free_memory()
        else:
            end_together(self.accelerator)
        if self.lock is not None:
            self.lock.release()

    def finish(self, another_follows: bool = False) -> None:
        """End the run with a last line, and with loss.png if a signal stopped it.

        Raises `UserError` if a file could not be written.
        """
        if self.stopped and self.accelerator.is_main_process:  # else it was drawn for the card
            with self.writing("loss.png"):
                plot_loss(self.output_dir)
        pushed = None if self.pushes is None else self._push_last(self.pushes)
        self.close(another_follows and not self.stopped)
        self.writing.raise_failure()
        processes = self.shape.num_processes, self.accelerator.device.type
        if self.stopped:
            command = resume_command(self.output_dir, self.settings, *processes)
            tell(f"stopped by a signal at step {self.step}, checkpoint written; continue with: {command}")
        else:
            saved = f"saved the pipeline, samples.png, loss.png and report.html in {self.output_dir}"
            if another_follows:  # a stage of a distillation
                say(saved)
            else:
                tell(f"{saved}; next: {sample_command(self.options)}")
        if pushed is not None:
            tell(pushed)

    def _push_last(self, pushes: Pushes) -> str:
        """Push what the run leaves, and return a line about it. The others wait for this without a collective.

        A run that was stopped has to end soon: it only pushes what its successor needs.
        """
        if self.stopped and not pushes.is_with_checkpoint:
            pushes.cancel()
        else:
            pushes.push(self.step, self.checkpoints.complete_step)
        return pushes.finish()

    # Checkpoints

    def save_checkpoint(self) -> None:
        """Write checkpoint-<step>: every rank stages its part, a rename completes it. A full disk only warns."""
        started = time.perf_counter()
        self._flush_log()
        self.power_averages.wait()  # a run resumed from this checkpoint writes only later snapshots again
        self.checkpoints.save(
            self.step, lambda: take_snapshot(self.unet, self.averages, self.optimizer.optimizer, self._state())
        )
        self.log.pause(time.perf_counter() - started)

    @property
    def averages(self) -> dict[str, ShardedEMA]:
        """The averages of the weights by their folder in a checkpoint."""
        return ({} if self.ema is None else {EMA: self.ema}) | self.power_averages.by_folder

    def _write_last_checkpoint(self) -> None:
        self._flush_log()
        self.power_averages.wait()
        self.checkpoints.wait()
        if self.step != self.checkpoints.saved_step and (self.stopped or self.options.checkpointing_steps):
            self.save_checkpoint()
            self.checkpoints.wait()

    def _state(self) -> dict:
        """What training_state.json holds apart from the optimizer's state."""
        scaler = self.accelerator.scaler
        return {
            "trainkit": __version__,
            "step": self.step,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "loss_scaler": None if scaler is None else scaler.state_dict(),
            "global_batch_size": self.shape.global_size,
            "skipped_in_a_row": self.skipped.in_a_row,
            "dataset": self.images.fingerprint,
            "dataset_description": describe_dataset(self.images),
            "options": {name: value for name, value in asdict(self.options).items() if name not in SECRET_OPTIONS},
        }
