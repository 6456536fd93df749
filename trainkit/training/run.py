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
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError

from trainkit.data.dataset import PreparedImages
from trainkit.data.loader import Batch, BatchLoader, BatchShape
from trainkit.diffusion.ema import averaged_weights, build_ema
from trainkit.errors import UserError
from trainkit.training import checkpoint as checkpoints
from trainkit.training.metrics import StepLog, plot_loss, truncate_metrics
from trainkit.training.optimization import build_lr_scheduler, build_optimizer
from trainkit.training.signals import StopSignals


class Run:
    """One training run: model, optimizer, schedule, EMA, data position, checkpoints and logs.

    `step` is the number of optimizer steps done; `model` is what the loss calls, `unet` the same without wrappers.
    """

    def __init__(self, options, accelerator: Accelerator, unet: UNet2DModel, images: PreparedImages):
        self.options, self.accelerator, self.images = options, accelerator, images
        self.output_dir = Path(options.output_dir)
        self.step, self.stopped = 0, False
        self._prepare_output_dir()
        candidates = self._resume_candidates()
        self.shape = self._batch_shape(candidates)
        self.max_train_steps = options.max_train_steps or math.ceil(
            options.num_epochs * len(images) / self.shape.global_size
        )
        self.ema: EMAModel | None = build_ema(options, unet)
        optimizer = build_optimizer(options, unet.parameters())
        self.lr_scheduler = build_lr_scheduler(options, optimizer, self.max_train_steps)
        self.model, self.optimizer = accelerator.prepare(unet, optimizer)
        self.unet: UNet2DModel = accelerator.unwrap_model(self.model)
        if self.ema is not None:
            self.ema.to(accelerator.device)
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)
        self._resume(candidates)
        self.loader = BatchLoader(
            images, self.shape, options.seed, options.random_flip, accelerator.device, options.dataloader_num_workers
        )
        self._micro_step = 0
        self._unwritten: dict[str, str] = {}  # what could not be written, and why
        self._step_loss = torch.zeros((), device=accelerator.device)
        self._saved_step = self.step if self.step else None
        self.log = StepLog(options, accelerator, self.output_dir, self.shape.global_size)
        self._announce()

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
                with self.accelerator.no_sync(self.model) if not self.end_of_step else contextlib.nullcontext():
                    yield batch
                if self.end_of_step and signals.agreed():
                    self.stopped = True
                    break
            self.log.flush(self.loader.wait_s)
            if self.step != self._saved_step and (self.stopped or self.options.checkpointing_steps):
                self.save_checkpoint()
        finally:
            signals.close()
            self.log.close()

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
        grad_norm = self.accelerator.clip_grad_norm_(self.unet.parameters(), self.options.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        if not self.accelerator.optimizer_step_was_skipped:  # fp16: the loss scale was too high
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self.unet.parameters())
        self.step += 1
        self.log.add(self.step, self._step_loss, learning_rate, grad_norm)
        self._step_loss = torch.zeros_like(self._step_loss)
        if self.step % self.options.logging_steps == 0 or self.step == self.max_train_steps:
            self.log.flush(self.loader.wait_s)
        if self.options.checkpointing_steps and self.step % self.options.checkpointing_steps == 0:
            self.save_checkpoint()

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
        """The UNet with its averaged weights, for sampling and saving; the time inside is not counted as training."""
        self.log.flush(self.loader.wait_s)  # trackers take no step below one they have seen
        started = time.perf_counter()
        with averaged_weights(self.unet, self.ema) as unet:
            yield unet
        self.log.pause(time.perf_counter() - started)

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Around writing `what` into the output folder: a full disk there costs a warning, not the training."""
        try:
            yield
            self._unwritten.pop(what, None)
        except (OSError, RuntimeError, SafetensorError) as error:  # by the writer
            self._unwritten[what] = reason = " ".join(str(error).split())[:300]
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
            what, reason = next(iter(self._unwritten.items()))
            raise UserError(
                f"--output_dir {self.output_dir}: {what} could not be written ({reason}): free some space, then run "
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
        """Write checkpoint-<step>: staged by every rank, renamed when whole on all; a full disk only warns."""
        started = time.perf_counter()
        self.log.flush(self.loader.wait_s)
        staging = checkpoints.staging_folder(self.output_dir, self.step)
        final = self.output_dir / f"{checkpoints.PREFIX}{self.step}"
        is_main = self.accelerator.is_main_process
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        name, written = final.name, False
        with self.writing(name):
            staging.mkdir(parents=True, exist_ok=True)
            self.accelerator.save_state(str(staging), safe_serialization=True)
            if is_main:
                (staging / checkpoints.STATE).write_text(json.dumps(self._state(), indent=1))
            written = True
        whole = self._all_ranks(written)
        if whole and is_main:
            whole = False
            with self.writing(name):
                checkpoints.commit(staging, final)
                checkpoints.rotate(self.output_dir, self.options.checkpoints_total_limit, final)
                whole = True
        if self._all_ranks(whole):
            self._saved_step = self.step
            self._unwritten.clear()
        elif is_main:
            shutil.rmtree(staging, ignore_errors=True)
        self.log.pause(time.perf_counter() - started)

    def _state(self) -> dict:
        return {
            "step": self.step,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "global_batch_size": self.shape.global_size,
            "dataset": self.images.fingerprint,
            "options": {name: value for name, value in asdict(self.options).items() if name != "hub_token"},
        }

    def _all_ranks(self, whole: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return whole
        failures = torch.tensor([0 if whole else 1], device=self.accelerator.device)
        return self.accelerator.reduce(failures, "sum").item() == 0

    def _save_weights(self, models: list, weights: list, folder: str) -> None:
        weights.clear()  # written here, so that Accelerate does not write them a second time
        if self.accelerator.is_main_process:
            self.unet.save_pretrained(Path(folder) / "unet")
            if self.ema is not None:
                self.ema.save_pretrained(Path(folder) / "unet_ema")

    def _load_weights(self, models: list, folder: str) -> None:
        models.clear()
        saved = UNet2DModel.from_pretrained(Path(folder) / "unet")
        self.unet.load_state_dict(saved.state_dict())
        if self.ema is not None:
            self.ema.load_state_dict(EMAModel.from_pretrained(Path(folder) / "unet_ema", UNet2DModel).state_dict())
            self.ema.to(self.accelerator.device)

    def _resume_candidates(self) -> list[Path]:
        """The checkpoints to resume from, best first, the same on every rank."""
        if self.options.resume_from_checkpoint is None:
            return []
        candidates = checkpoints.resume_candidates(self.output_dir, self.options.resume_from_checkpoint)
        whole = []
        for folder in candidates:
            problem = checkpoints.damage(folder)
            if problem is None:
                whole.append(folder)
            elif self.accelerator.is_main_process:
                print(f"WARNING: {folder} is damaged ({problem}); trying the one before", flush=True)
        if candidates and not whole:
            raise UserError(
                f"--resume_from_checkpoint latest: every checkpoint in {self.output_dir} is damaged; "
                "--overwrite_output_dir starts again"
            )
        if not whole and self.accelerator.is_main_process:
            print(f"no checkpoint in {self.output_dir} yet: starting a new run", flush=True)
        return broadcast_object_list([whole])[0]

    def _resume(self, candidates: list[Path]) -> None:
        for folder in candidates:
            try:
                self.accelerator.load_state(str(folder))
                state = checkpoints.read_state(folder)
                self.lr_scheduler.load_state_dict(state["lr_scheduler"])
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
            self.step = state["step"]
            if self.accelerator.is_main_process:
                truncate_metrics(self.output_dir, self.step)
                print(f"resumed from {folder}: {self.step} of {self.max_train_steps} steps done", flush=True)
                if state["dataset"] != self.images.fingerprint:
                    print("WARNING: the dataset has changed since this checkpoint was made", flush=True)
            return

    # Start

    def _prepare_output_dir(self) -> None:
        problem = None
        if self.accelerator.is_main_process:
            try:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                (self.output_dir / ".write_test").touch()
                (self.output_dir / ".write_test").unlink()
                checkpoints.remove_leftovers(self.output_dir)
                problem = self._refuse_earlier_run()
            except OSError as error:
                problem = f"--output_dir {self.output_dir} cannot be written ({error.strerror}): choose another folder"
        problem = broadcast_object_list([problem])[0]
        if problem:
            raise UserError(problem)

    def _refuse_earlier_run(self) -> str | None:
        if self.options.resume_from_checkpoint is not None:
            return None
        earlier = checkpoints.checkpoint_folders(self.output_dir)
        if earlier and not self.options.overwrite_output_dir:
            return (
                f"--output_dir {self.output_dir} holds {earlier[-1].name} of an earlier run: go on with "
                "--resume_from_checkpoint latest, or start again with --overwrite_output_dir (deletes its checkpoints)"
            )
        for folder in earlier:
            shutil.rmtree(folder)
        truncate_metrics(self.output_dir, 0)
        return None

    def _batch_shape(self, candidates: list[Path]) -> BatchShape:
        """The division of the global batch; on resume the global batch stays, and the micro-steps follow."""
        options, accelerator = self.options, self.accelerator
        micro_steps = options.gradient_accumulation_steps
        once = options.train_batch_size * accelerator.num_processes
        if candidates:
            kept = checkpoints.read_state(candidates[0])["global_batch_size"]
            if kept % once:
                raise UserError(
                    f"--train_batch_size {options.train_batch_size} on {accelerator.num_processes} processes cannot "
                    f"make up the global batch of {kept} images that {candidates[0].name} was trained with: choose a "
                    f"divisor of {kept // math.gcd(kept, accelerator.num_processes)}"
                )
            if kept // once != micro_steps and accelerator.is_main_process:
                print(f"--gradient_accumulation_steps {kept // once} keeps the global batch of {kept}", flush=True)
            micro_steps = kept // once
        accelerator.gradient_accumulation_steps = micro_steps
        return BatchShape(options.train_batch_size, micro_steps, accelerator.num_processes, accelerator.process_index)

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self.unet.parameters())
        shape, size = self.shape, f"{self.images.height}x{self.images.width}"
        self.accelerator.print(
            f"{len(self.images):,} images {size}, {parameters / 1e6:.1f} M parameters, "
            f"{self.max_train_steps:,} steps of {shape.global_size} images = "
            f"{shape.per_device} a device x {shape.num_processes} processes x {shape.micro_steps} micro-steps, "
            f"{self.accelerator.device.type} with mixed precision {self.accelerator.mixed_precision}",
            flush=True,
        )
