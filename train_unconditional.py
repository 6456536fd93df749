"""Train an unconditional diffusion model (a UNet2DModel) on images, and save a pipeline that loads anywhere.

    accelerate launch train_unconditional.py --train_data_dir photos --resolution 64 --random_flip \\
        --output_dir ddpm-photos-64 --mixed_precision bf16

    # the same run from a recipe, with one setting changed
    accelerate launch train_unconditional.py --config recipes/mnist_demo.yaml --train_data_dir digits --seed 1

    # after a kill, a crash or Ctrl-C: the same command and
        --resume_from_checkpoint latest

A folder of images is prepared once into a cache; a folder that prepare_dataset.py made is opened as it is.
Every flag of diffusers' script of this name works here with the same meaning. Steps are optimizer steps.
"""

from dataclasses import dataclass

from trainkit.errors import run_script
from trainkit.training.start import TrainingOptions, parse_training_options


@dataclass
class Options(TrainingOptions):
    """Everything train_unconditional.py can be told."""


def train(options: Options) -> None:
    # Imported late, so that --help answers at once.
    from trainkit.data.cache import open_or_prepare
    from trainkit.data.loading.augment_draws import LABELS
    from trainkit.diffusion.augmentation_input import add_augmentation_input
    from trainkit.diffusion.noise_schedule import add_noise, build_noise_scheduler
    from trainkit.diffusion.objective import denoising_errors
    from trainkit.diffusion.pretrained import load_pretrained
    from trainkit.diffusion.timesteps import draw_timesteps
    from trainkit.diffusion.unet import build_unet
    from trainkit.hub import create_repository
    from trainkit.training.learning_rate import find_learning_rate
    from trainkit.training.run import Run
    from trainkit.training.score import SampleScore
    from trainkit.training.start import check_before_preparation, start_accelerator
    from trainkit.training.validation import HeldOutLoss, open_validation_images

    check_before_preparation(options)
    images = open_or_prepare(options)  # before any process group exists: a long preparation must not time it out
    held_out = open_validation_images(options, images)
    accelerator = start_accelerator(options)
    unet = build_unet(options, images.height, images.width, images.channels)
    if options.pretrained_model_name_or_path is not None:
        accelerator.print(load_pretrained(unet, options.pretrained_model_name_or_path))
    if options.augmentation_conditioning:
        add_augmentation_input(unet, LABELS)
    noise_scheduler = build_noise_scheduler(options)
    run = Run(options, accelerator, unet, images)
    repo_id = create_repository(options) if options.push_to_hub and accelerator.is_main_process else None

    def losses(model, batch, timesteps):  # one an image, of training and of validation alike
        noisy_images = add_noise(noise_scheduler, batch.images, batch.noise, timesteps)  # float32
        told = {} if batch.augmentation is None else {"augmentation": batch.augmentation}
        prediction = model(noisy_images, timesteps, **told).sample  # under autocast
        weighting = options.snr_gamma, options.loss_weighting
        return denoising_errors(noise_scheduler, prediction, batch.images, batch.noise, timesteps, *weighting)

    def loss_of(model, batch):
        return losses(model, batch, draw_timesteps(options, noise_scheduler, batch.uniforms)).mean()

    if options.find_learning_rate:
        find_learning_rate(run, loss_of)
        return
    validation = None if held_out is None else HeldOutLoss(run, held_out, losses, options.ddpm_num_steps)
    score = None if options.score_steps is None else SampleScore(run, held_out, noise_scheduler)

    for batch in run.batches():
        run.update(loss_of(run.model, batch))

        if run.due(steps=options.validation_steps):
            validation.measure()
        if run.due(steps=options.score_steps):
            score.measure()
        if run.due(steps=options.preview_steps, epochs=options.save_images_epochs):
            preview(run, noise_scheduler)
        if run.due(epochs=options.save_model_epochs):
            save(run, noise_scheduler, repo_id)

    if not run.stopped:
        preview(run, noise_scheduler)
        save(run, noise_scheduler, repo_id)
        for measurement in (validation, score):
            if measurement is not None:
                measurement.measure()
    run.finish()


def preview(run, noise_scheduler) -> None:
    """Write a grid of samples from the averaged weights, made by all processes: samples/<step>.png and samples.png."""
    from trainkit.sampling.generate import generate_over_processes
    from trainkit.sampling.schedulers import DEFAULT_SCHEDULER, scheduler_bundle
    from trainkit.training.outputs import write_preview

    options = run.options
    with run.averaged_weights() as unet:
        samples = generate_over_processes(
            run.accelerator,
            unet,
            scheduler_bundle(noise_scheduler)[DEFAULT_SCHEDULER],
            num_images=options.eval_batch_size,
            seed=options.seed,
            num_inference_steps=options.ddpm_num_inference_steps,
            batch_size=options.eval_batch_size,
        )
    write_preview(run, samples)


def save(run, noise_scheduler, repo_id: str | None) -> None:
    """Save the pipeline with the averaged weights into --output_dir, and push it where asked."""
    from trainkit.hub import model_card, push_pipeline
    from trainkit.sampling.pipeline import PIPELINE_FILES, save_pipeline

    options, images = run.options, run.images
    with run.averaged_weights() as unet:
        if run.accelerator.is_main_process:
            card = model_card(options, images.height, images.width, run.step, run.shape.global_size)
            with run.writing("the pipeline"):
                save_pipeline(run.output_dir, unet, noise_scheduler, card)
                if repo_id is not None:
                    push_pipeline(run.output_dir, repo_id, options.hub_token, PIPELINE_FILES, run.step)
    run.accelerator.wait_for_everyone()


def main() -> None:
    train(parse_training_options(Options, __doc__))


if __name__ == "__main__":
    run_script(main)
