"""The training run: what must be right once, around a loop that the script keeps in sight.

    run = Run(options, accelerator, unet, images)
    for batch in run.batches():          # from the checkpoint's step to max_train_steps or a stop signal
        run.update(loss_of(batch))       # backward; at the last micro-step: clip, step, EMA, schedule, log, checkpoint
        if run.due(epochs=10):           # at the end of the optimizer step that completes every tenth epoch
            ...
    run.finish()

Steps are optimizer steps. The global batch of step s and all its randomness are functions of (seed, s) alone.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from safetensors import SafetensorError

from trainkit.data.loading.augment import build_augmentation
from trainkit.data.loading.class_order import ClassBalancedOrder
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.loader import Batch, BatchLoader, Condition
from trainkit.diffusion.augmentation_input import without_augmentation_input
from trainkit.errors import UserError
from trainkit.options.training import SECRET_OPTIONS
from trainkit.training.division import divide_global_batch
from trainkit.training.ema import ShadowWeights, build_ema
from trainkit.training.guards import SkippedSteps, check_replicas, step_if_finite
from trainkit.training.metrics import StepLog, plot_loss, truncate_metrics
from trainkit.training.optimization import averaged_by_optimizer, build_lr_scheduler, build_optimizer
from trainkit.training.power_ema import PowerAverages
from trainkit.training.resume import claim_output_dir, told_differences, whole_checkpoints
from trainkit.training.sharding import (
    gradient_norm_to_tensor,
    is_sharded,
    no_gradient_sync,
    shard,
    unsharded_copy,
)
from trainkit.training.signals import StopSignals
from trainkit.training.speed import (
    compile_unet,
    lay_out,
    memory_format,
    uncompiled,
)
from trainkit.training.state import EMA, restore, restore_random_states, take_snapshot
from trainkit.training.throughput import Throughput, flops_of_image
from trainkit.training.writer import CheckpointWriter


class Run:
    """One training run: model, optimizer, schedule, EMA, data position, checkpoints and logs.

    `step` is the number of optimizer steps done; `model` is what the loss calls, `unet` the same without wrappers.
    `condition` tells the model more of an image than its pixels; `order` replaces that of every image once an epoch.
    """

    def __init__(
        self,
        options,
        accelerator: Accelerator,
        unet: UNet2DModel,
        images: PreparedImages,
        condition: Condition | None = None,
        order: ClassBalancedOrder | None = None,
    ):
        self.options, self.accelerator, self.images, self.condition = options, accelerator, images, condition
        self.output_dir = Path(options.output_dir)
        self.step, self.stopped = 0, False
        claim_output_dir(options, accelerator)
        candidates = whole_checkpoints(options, accelerator)
        unet = lay_out(unet, options, accelerator.device)
        self.shape = divide_global_batch(options, accelerator, unet, images, self._inputs_of, candidates)
        self.max_train_steps = self._steps_in_all()
        image_flops = flops_of_image(unet, (images.channels, images.height, images.width), self._inputs_of(1))
        throughput = Throughput(
            image_flops, accelerator.device, accelerator.mixed_precision, accelerator.num_processes
        )
        if options.shard_weights and accelerator.num_processes > 1:
            unet = accelerator.prepare_model(unet, evaluation_mode=True)  # device and autocast, no DDP
            shard(unet, accelerator.mixed_precision, accelerator.device, options.reshard_after_forward)
            optimizer = build_optimizer(options, unet)
            self.model, self.optimizer = unet, accelerator.prepare_optimizer(optimizer)
        else:
            optimizer = build_optimizer(options, unet)
            self.model, self.optimizer = accelerator.prepare(unet, optimizer)
        self.lr_scheduler = build_lr_scheduler(options, optimizer, self.max_train_steps)
        self.unet: UNet2DModel = accelerator.unwrap_model(self.model)
        compile_unet(self.unet, options, self.shape.micro_steps)
        self.sharded = is_sharded(self.unet)
        self.ema: ShadowWeights | None = build_ema(options, self.unet, self.shape.global_size)
        self.power_averages = PowerAverages(
            options, accelerator, self.unet, self.shape.global_size, self.max_train_steps, candidates, self.writing
        )
        self.averages = ({} if self.ema is None else {EMA: self.ema}) | self.power_averages.by_folder
        resumed = self._resume(candidates)
        self.loader = BatchLoader(
            images, self.shape, options.seed, options.random_flip, accelerator.device, options.dataloader_num_workers,
            memory_format(options, accelerator.device), options.shuffle_block_size,
            build_augmentation(options, images.channels), condition, order,
        )  # fmt: skip
        self._micro_step = 0
        self._unwritten: dict[str, str] = {}  # kind of file -> what could not be written, and why
        self._step_loss = torch.zeros((), device=accelerator.device)
        self.checkpoints = CheckpointWriter(
            self.output_dir, accelerator, options.checkpoints_total_limit, options.async_checkpointing, self.writing
        )
        self.checkpoints.saved_step = self.step or None
        self.skipped = SkippedSteps(
            images, self.loader.order, self.shape.global_size, options.max_skipped_steps, self.output_dir,
            accelerator.is_main_process, resumed.get("skipped_in_a_row", 0),
        )  # fmt: skip
        self.log = StepLog(options, accelerator, self.output_dir, self.shape.global_size, throughput)
        self.power_averages.begin(self.step)
        self._announce(throughput)

    # The loop

    def batches(self) -> Iterator[Batch]:
        """The micro-batches from the current step on, until `max_train_steps` or a stop signal."""
        signals = StopSignals()
        self.log.start(self.step, self.max_train_steps)
        self.model.train()
        try:
            for batch in self.loader.iterate(self.step, self.max_train_steps):
                self._micro_step = batch.micro_step
                first_row = self.shape.rows(batch.micro_step).start
                torch.manual_seed(hash((self.options.seed, batch.step, first_row)))  # dropout, where the model has any
                with contextlib.nullcontext() if self.end_of_step else self.no_gradient_sync():
                    yield batch
                if self.end_of_step and signals.agreed():
                    self.stopped = True
                    break
            self._flush_log()
            self.power_averages.settle()
            self.checkpoints.settle()
            if self.step != self.checkpoints.saved_step and (self.stopped or self.options.checkpointing_steps):
                self.save_checkpoint()
                self.checkpoints.settle()
        finally:
            signals.close()
            self.power_averages.close()
            self.checkpoints.close()
            self.log.close()

    def no_gradient_sync(self) -> contextlib.AbstractContextManager:
        """Around every micro-step of an optimizer step but the last."""
        return no_gradient_sync(self.unet) if self.sharded else self.accelerator.no_sync(self.model)

    @property
    def end_of_step(self) -> bool:
        """Whether the current micro-step is the last one of its optimizer step."""
        return self._micro_step == self.shape.micro_steps - 1

    def update(self, loss: torch.Tensor) -> None:
        """Backward of a micro-step's `loss` (scalar, mean over its images); the optimizer step after the last."""
        self.accelerator.backward(loss)
        self._step_loss += loss.detach() / self.shape.micro_steps
        if not self.end_of_step:
            return
        limit = self.options.max_grad_norm or math.inf
        grad_norm = gradient_norm_to_tensor(self.accelerator.clip_grad_norm_(self.unet.parameters(), limit))
        if self.accelerator.scaler is None:
            step_if_finite(self.optimizer.optimizer, torch.as_tensor(grad_norm))
        else:  # fp16: a step whose loss scale was too high is left out by the scaler
            self.optimizer.step()
        self.optimizer.zero_grad()
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step()
        self.power_averages.step()
        self.step += 1
        self.log.add(self.step, self._step_loss, learning_rate, grad_norm)
        self._step_loss = torch.zeros_like(self._step_loss)
        if self.step % self.options.logging_steps == 0 or self.step == self.max_train_steps:
            self._flush_log()
        if not self.sharded and self.options.replica_check_steps and self.step % self.options.replica_check_steps == 0:
            check_replicas(self.accelerator, self.unet, self.step)
        if self.options.checkpointing_steps and self.step % self.options.checkpointing_steps == 0:
            self.save_checkpoint()
        self.log.pause(self.power_averages.snapshot(self.step))  # after the checkpoint, which does not wait for it

    def _flush_log(self) -> None:
        scaler = self.accelerator.scaler  # fp16: it looks for its scale by letting steps overflow
        for step, grad_norm in self.log.flush(self.loader.wait_s):
            self.skipped.see(step, math.isfinite(grad_norm) or (scaler is not None and scaler.get_scale() >= 1))

    def due(self, steps: int | None = None, epochs: int | None = None) -> bool:
        """Whether the optimizer step that just ended completes `steps` steps or, without that, `epochs` epochs."""
        if not self.end_of_step:
            return False
        if steps:
            return self.step % steps == 0
        return bool(epochs) and self._epochs_done(self.step) // epochs > self._epochs_done(self.step - 1) // epochs

    def _epochs_done(self, step: int) -> int:
        return step * self.shape.global_size // len(self.images)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[UNet2DModel]:
        """The whole UNet with its averaged weights (its own where there is no EMA), for sampling and saving.

        In evaluation mode, on every rank; the time inside is not counted as training.
        """
        self._flush_log()  # trackers take no step below one they have seen
        started = time.perf_counter()
        with averaged_by_optimizer(self.optimizer.optimizer) if self.ema is None else self.ema.swapped_in():
            with without_augmentation_input(self.unet):
                unet = unsharded_copy(self.unet) if self.sharded else self.unet
                unet.eval()
                with uncompiled(unet):
                    yield unet
        self.unet.train()
        self.log.pause(time.perf_counter() - started)

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Around writing `what` into the output folder: a full disk there costs a warning, not the training."""
        kind = what.partition("-")[0]  # a whole checkpoint makes up for one before it
        try:
            yield
            self._unwritten.pop(kind, None)
        except (OSError, RuntimeError, SafetensorError) as error:  # by the writer
            reason = " ".join(str(error).split())[:300]
            self._unwritten[kind] = f"{what} could not be written ({reason})"
            print(
                f"\nWARNING: {what} could not be written to --output_dir {self.output_dir} ({reason}); training goes "
                "on, and what was written before is kept. Is the disk full?",
                flush=True,
            )

    def finish(self) -> None:
        """End the run with loss.png and a last word; raises `UserError` where something is left unwritten."""
        if self.accelerator.is_main_process:
            with self.writing("loss.png"):
                plot_loss(self.output_dir)
        self.accelerator.end_training()
        if self._unwritten:
            raise UserError(
                f"--output_dir {self.output_dir}: {next(iter(self._unwritten.values()))}: free some space, then run "
                "the same command with --resume_from_checkpoint latest"
            )
        if self.stopped:
            self.accelerator.print(
                f"stopped by a signal at step {self.step}: go on with --resume_from_checkpoint latest"
            )
        else:
            self.accelerator.print(f"saved the pipeline, samples.png and loss.png in {self.output_dir}")

    # Checkpoints

    def save_checkpoint(self) -> None:
        """Write checkpoint-<step>: staged by every rank, renamed when whole; a full disk only warns."""
        started = time.perf_counter()
        self._flush_log()
        self.power_averages.settle()  # a run resumed from this checkpoint makes only later ones again
        self.checkpoints.save(
            self.step, lambda: take_snapshot(self.unet, self.averages, self.optimizer.optimizer, self._facts())
        )
        self.log.pause(time.perf_counter() - started)

    def _facts(self) -> dict:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "loss_scaler": None if scaler is None else scaler.state_dict(),
            "global_batch_size": self.shape.global_size,
            "skipped_in_a_row": self.skipped.in_a_row,
            "dataset": self.images.fingerprint,
            "options": {name: value for name, value in asdict(self.options).items() if name not in SECRET_OPTIONS},
        }

    def _resume(self, candidates: list[Path]) -> dict:
        """Load the first of `candidates` that can be loaded; returns its training_state.json, {} for a new run."""
        for folder in candidates:
            try:
                facts = restore(folder, self.unet, self.averages, self.optimizer.optimizer)
                self.lr_scheduler.load_state_dict(facts["lr_scheduler"])
                if self.accelerator.scaler is not None and facts["loss_scaler"]:
                    self.accelerator.scaler.load_state_dict(facts["loss_scaler"])
                restore_random_states(folder, self.accelerator.process_index)
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                if folder == candidates[-1]:
                    raise UserError(
                        f"--resume_from_checkpoint {folder} does not fit this run or is damaged ({reason}): resume "
                        "with the options it was made with (they are in its training_state.json)"
                    ) from None
                if self.accelerator.is_main_process:
                    print(f"WARNING: {folder} cannot be loaded ({reason}); trying the one before", flush=True)
                continue
            self.step = facts["step"]
            if self.accelerator.is_main_process:
                self._tell_of_resume(folder, facts)
            return facts
        return {}

    def _tell_of_resume(self, folder: Path, facts: dict) -> None:
        truncate_metrics(self.output_dir, self.step)
        print(f"resumed from {folder}: {self.step} of {self.max_train_steps} steps done", flush=True)
        if facts["dataset"] != self.images.fingerprint:
            print("WARNING: the dataset has changed since this checkpoint was made", flush=True)
        differences = told_differences(facts["options"], asdict(self.options))
        if differences:
            print(
                f"WARNING: resumed with other options, so this is another run: {differences}",
                flush=True,
            )

    # Start

    def _steps_in_all(self) -> int:
        options, size = self.options, self.shape.global_size
        if options.max_train_steps and options.max_train_images:
            raise UserError("--max_train_steps and --max_train_images both say how long to train: give one of them")
        if options.max_train_images:
            return math.ceil(options.max_train_images / size)
        return options.max_train_steps or math.ceil(options.num_epochs * len(self.images) / size)

    def _inputs_of(self, size: int) -> dict[str, torch.Tensor]:
        """The model's further arguments for `size` images, as large as those of training."""
        return {} if self.condition is None else self.condition.inputs(np.zeros(size, dtype=np.int64))

    def _told_division(self) -> str:
        stage = "ZeRO-3" if self.options.reshard_after_forward else "ZeRO-2"
        return f"weights divided over them ({stage}), " if self.sharded else ""

    def _announce(self, throughput: Throughput) -> None:
        parameters = sum(p.numel() for p in self.unet.parameters())
        shape, size = self.shape, f"{self.images.height}x{self.images.width}"
        self.accelerator.print(
            f"{len(self.images):,} images {size}, {parameters / 1e6:.1f} M parameters, "
            f"{self.max_train_steps:,} steps of {shape.global_size} images = "
            f"{shape.per_device} a device x {shape.num_processes} processes x {shape.micro_steps} micro-steps, "
            f"{self._told_division()}mixed precision {self.accelerator.mixed_precision}; {throughput}",
            flush=True,
        )
