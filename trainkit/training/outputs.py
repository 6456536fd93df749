"""What a run produces besides checkpoints: held-out loss, scores, sample grids and the saved pipeline."""

from collections.abc import Callable

import numpy as np
import torch

from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.loader import Batch
from trainkit.data.loading.order import sample_indices
from trainkit.diffusion.combined import CombinedCondition
from trainkit.diffusion.conditioning import ImageCondition, preview_scale
from trainkit.hub.options import start_pushes
from trainkit.options.script import ConditionalTrainingOptions
from trainkit.processes import wait_for_everyone
from trainkit.report.card_results import update_card
from trainkit.sampling.generate import Pipeline, generate_in_blocks
from trainkit.sampling.grid import image_grid, save_image
from trainkit.sampling.pipeline import save_pipeline, scheduler_name, use_default_scheduler
from trainkit.terminal import only_warn
from trainkit.training.log import plot_loss
from trainkit.training.model_card import model_card
from trainkit.training.run import Run
from trainkit.training.run_report import RunReport
from trainkit.training.score import SampleScore
from trainkit.training.validation import HeldOutLoss

PREVIEW_COLUMNS = 6  # of condition, sample and true image, twice


class Outputs:
    """Writes the outputs of a run when they are due. Create it, and call it, on every rank.

    `losses(model, batch, timesteps)` returns one loss per image (B,), for training and validation alike.
    `pipeline_of(unet)` returns the pipeline of a trained UNet, whose scheduler is the noise schedule of training.
    `held_out` and `held_out_condition` are the validation images and the condition of each. `origin` goes into the
    card of a few-step student.
    """

    def __init__(
        self,
        run: Run,
        losses: Callable[[torch.nn.Module, Batch, torch.Tensor], torch.Tensor],
        pipeline_of: Callable[[torch.nn.Module], Pipeline],
        held_out: PreparedImages | None = None,
        held_out_condition: ImageCondition | None = None,
        origin: str | None = None,
    ):
        self.run, self.pipeline_of, options = run, pipeline_of, run.options
        self.preview_condition = run.condition
        if held_out_condition is not None and held_out_condition.picture is not None:
            self.preview_condition = held_out_condition  # pictures of other images show more
        self.validation: HeldOutLoss | None = None
        self.score: SampleScore | None = None
        self._scheduler = ""  # of the latest samples
        self.report = RunReport(run, held_out, origin)
        if options.push_to_hub and run.accelerator.is_main_process:
            run.pushes = start_pushes(options)
        if held_out is not None:
            self.validation = HeldOutLoss(run, held_out, losses, options.ddpm_num_steps, held_out_condition)
        if options.score_steps is not None:
            self.score = SampleScore(run, held_out, self._generate_unguided)

    def write_due(self) -> None:
        """Write what is due after the current step. Call it after every `run.update`."""
        run, options = self.run, self.run.options
        self.report.follow()
        if self.validation is not None and run.due(steps=options.validation_steps):
            self.validation.measure()
        if self.score is not None and run.due(steps=options.score_steps):
            self.score.measure()
        if run.due(steps=options.preview_steps, epochs=options.save_images_epochs):
            self.write_preview()
        if run.due(epochs=options.save_model_epochs):
            self.save()
            if run.pushes is not None and options.hub_strategy != "end":
                run.pushes.push(run.step, run.checkpoints.complete_step)

    def write_final(self) -> None:
        """Write the outputs of a finished run; only its report if it was stopped by a signal."""
        if self.run.stopped:
            self.report.write()
            return
        self.write_preview()
        for measurement in (self.validation, self.score):  # before the card, which names what they found
            if measurement is not None:
                measurement.measure()
        self.save(finished=True)

    def write_preview(self) -> None:
        """Write a grid of samples from the averaged weights: samples/<step>.png and samples.png.

        With a second image it shows condition, sample and true image side by side.
        """
        run, options, count = self.run, self.run.options, self.run.options.eval_batch_size
        conditions: list | np.ndarray | None = None
        columns, guidance, names, captions = None, {}, None, None
        condition = self.preview_condition
        if condition is not None:
            assert isinstance(options, ConditionalTrainingOptions)  # a condition comes from them
            conditions, columns = condition.preview_conditions(count, options.seed)
            guidance = {"guidance_scale": preview_scale(options)}
            if condition.picture is None:
                names, captions = _words(condition, conditions)
        samples = self._generate(count if conditions is None else len(conditions), conditions, **guidance)
        if not run.accelerator.is_main_process:
            return
        if condition is not None and condition.picture is not None:
            samples, columns = condition.picture.beside(samples, options.seed), PREVIEW_COLUMNS
        grid = image_grid(samples, columns, row_names=names, captions=captions)
        with run.writing("samples.png"):
            (run.output_dir / "samples").mkdir(exist_ok=True)
            save_image(grid, run.output_dir / "samples" / f"{run.step:07d}.png")
            save_image(grid, run.output_dir / "samples.png")
            run.log.write_image("samples", grid, run.step)
        self.report.write()

    def save(self, finished: bool = False) -> None:
        """Save the pipeline with the averaged weights into --output_dir."""
        run, options = self.run, self.run.options
        with run.averaged_weights() as unet:
            if run.accelerator.is_main_process:
                pipeline = self.pipeline_of(unet)
                repo_id = None if run.pushes is None else run.pushes.repo_id
                with run.writing("the pipeline"):
                    if finished:
                        plot_loss(run.output_dir)  # a picture of the card
                    card = model_card(options, pipeline, run.condition, self.report.record(finished), repo_id)
                    save_pipeline(run.output_dir, pipeline, card)
                    with only_warn("the card has no scores"):
                        update_card(run.output_dir)
        self.report.write(finished)
        wait_for_everyone()

    def _generate_unguided(self, count: int) -> tuple[np.ndarray, str]:
        """`count` samples for a score, and their scheduler: guidance would reduce the diversity that it measures."""
        run = self.run
        if run.condition is None:
            return self._generate(count), self._scheduler
        indices = sample_indices(np.arange(count) % len(run.images), len(run.images), run.options.seed)
        samples = self._generate(count, run.condition.pipeline_conditions(indices), guidance_scale=1.0)
        return samples, self._scheduler

    def _generate(self, count: int, conditions: list | np.ndarray | None = None, **guidance) -> np.ndarray:
        """Images (count, H, W, C) uint8 of the averaged weights on every rank, from --seed, --seed + 1, ..."""
        options = self.run.options
        with self.run.averaged_weights() as unet:
            pipeline = use_default_scheduler(self.pipeline_of(unet))
            self._scheduler = scheduler_name(pipeline)
            blocks = generate_in_blocks(
                self.run.accelerator,
                pipeline,
                range(options.seed, options.seed + count),
                options.ddpm_num_inference_steps,
                options.eval_batch_size,
                conditions,
                **guidance,
            )
            return np.concatenate(list(blocks))


def _words(condition: ImageCondition, conditions: list | np.ndarray) -> tuple[list[str] | None, list[str] | None]:
    """What is written into a grid of `conditions`: classes beside the rows, and captions below the images.

    With a vector beside it, each image has its own class.
    """
    names = condition.names or ()
    if isinstance(condition, CombinedCondition):
        labels = [row["class_labels"] for row in conditions]
        return None, ["" if label is None else names[label] for label in labels]
    if names:
        return [names[label] for label in dict.fromkeys(conditions)], None
    return None, [str(text) for text in conditions] if condition.argument == "prompt" else None
