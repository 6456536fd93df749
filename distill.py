"""Distill a saved pipeline into a student that samples in 1 to 8 steps, and save it as a stock diffusers pipeline.

    accelerate launch distill.py --teacher_model_name_or_path ddpm-photos-64 --train_data_dir photos \\
        --output_dir photos-64-4-steps --num_steps 4 --max_train_steps 20000

    # one student for 1, 2 and 4 steps
        --method consistency

    # a conditional teacher: guidance becomes a part of the student
        --guidance_scale 2

    # after a kill, a crash or Ctrl-C: add this to the same command
        --resume_from_checkpoint latest

Teachers: every pipeline of train_unconditional.py and train_conditional.py, in pixels or latents, and stock
DDPMPipelines such as google/ddpm-cifar10-32. The images are those the teacher was trained on, or others like them.
The flags of the training scripts for data, optimizer, averages, checkpoints, logs and the Hub mean the same here.
"""

from trainkit.errors import UserError, run_script
from trainkit.options.distillation import DistillationOptions
from trainkit.options.script import parse_training_options


def distill(options: DistillationOptions) -> None:
    # Imported late, so that --help answers at once.
    from trainkit.distillation.data import check_options, open_data
    from trainkit.distillation.stages import Distillation, plan_stages
    from trainkit.distillation.teacher import engine_options, open_teacher
    from trainkit.processes import end_together
    from trainkit.terminal import say, tell
    from trainkit.training.next_step import sample_command
    from trainkit.training.start import start_accelerator

    teacher = open_teacher(options)
    plan_stages(options, teacher)
    engine = engine_options(options, teacher)
    check_options(options, engine)
    data = open_data(options, engine, teacher)  # before the process group, which a long preparation would time out
    accelerator = start_accelerator(engine)
    distillation = Distillation(options, data.engine, teacher, accelerator)
    if not options.dry_run:
        distillation.start()
    for number, stage in enumerate(distillation.stages, start=1):
        if not distillation.is_complete(stage):
            say(f"stage {number} of {len(distillation.stages)}: {stage}")
            stopped = train_student(distillation, stage, data)
            if stopped or options.find_learning_rate or options.dry_run:
                return
            distillation.complete(stage)
        distillation.next_teacher(stage)
    tell(f"saved the student in {options.output_dir}; next: {sample_command(engine)}")
    end_together(accelerator)


def train_student(distillation, stage, data) -> bool:
    """Train the student of `stage` from the averaged weights of its teacher; returns whether a signal stopped it."""
    import copy

    from trainkit.diffusion import few_step
    from trainkit.diffusion.consistency import NoiseLevels, consistency_losses
    from trainkit.diffusion.distillation import StepGrid, progressive_losses
    from trainkit.diffusion.noise_schedule import uniform_timesteps
    from trainkit.training.dry_run import only_measures
    from trainkit.training.outputs import Outputs
    from trainkit.training.start import start_run

    options, accelerator = distillation.options_of(stage), distillation.accelerator
    student = copy.deepcopy(distillation.unet)
    teacher = distillation.frozen_teacher(stage, data.condition)
    prediction = distillation.prediction_type
    alphas_cumprod = distillation.teacher.alphas_cumprod
    grid = StepGrid(alphas_cumprod, stage.num_steps * max(1, stage.substeps), accelerator.device)
    levels = NoiseLevels(few_step.consistency_schedule(alphas_cumprod), prediction, accelerator.device)
    run = start_run(options, accelerator, student, data.images, data.condition, settings=distillation.options)

    def losses(model, batch, timesteps):  # one per image
        if stage.substeps == 0:
            progress = batch.step / run.max_train_steps
            return consistency_losses(model, levels, batch, levels.logs_at(timesteps), progress)
        steps = timesteps * stage.num_steps // len(alphas_cumprod)
        return progressive_losses(model, teacher, grid, stage.substeps, prediction, batch, steps)

    def loss_of(model, batch):
        if stage.substeps == 0:
            logs, progress = levels.draw(batch.uniforms), batch.step / run.max_train_steps
            return consistency_losses(model, levels, batch, logs, progress).mean()
        return losses(model, batch, uniform_timesteps(batch.uniforms, len(alphas_cumprod))).mean()

    if only_measures(run, options, loss_of, distillation.count_steps(stage, run)):  # --dry_run, --find_learning_rate
        return False
    held_out = data.held_out, data.held_out_condition
    outputs = Outputs(run, losses, distillation.pipeline_of(stage), *held_out, distillation.origin(stage))

    for batch in run.batches():
        run.update(loss_of(run.model, batch))
        outputs.write_due()

    outputs.write_final()
    run.finish(another_follows=True)
    return run.stopped


def main() -> None:
    options = parse_training_options(DistillationOptions, __doc__)
    if options.resume_from_checkpoint not in (None, "latest"):
        raise UserError(
            f"--resume_from_checkpoint {options.resume_from_checkpoint}: distill.py resumes the stage that was "
            "interrupted; give latest"
        )
    if options.hub_strategy == "checkpoint":
        raise UserError("--hub_strategy checkpoint: distill.py resumes from its own folder; use end or every_save")
    distill(options)


if __name__ == "__main__":
    run_script(main)
