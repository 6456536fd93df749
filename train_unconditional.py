"""Train an unconditional diffusion model (a UNet2DModel) on images or their latents, and save a diffusers pipeline.

    accelerate launch train_unconditional.py --train_data_dir photos --resolution 64 --random_flip \\
        --output_dir ddpm-photos-64 --mixed_precision bf16

    # the same run from a recipe, with one setting changed
    accelerate launch train_unconditional.py --config recipes/mnist_demo.yaml --train_data_dir digits --seed 1

    # on the latents of an autoencoder, for large images
        --vae_name_or_path stabilityai/sd-vae-ft-mse --resolution 256 --center_crop

    # after a kill, a crash or Ctrl-C: add this to the same command
        --resume_from_checkpoint latest

A folder of images is prepared once and cached. A dataset from prepare_dataset.py is opened directly.
All flags of the diffusers example of this name work here with the same meaning. Steps are optimizer steps.
"""

from dataclasses import dataclass

from trainkit.errors import run_script
from trainkit.options.script import TrainingOptions, parse_training_options


@dataclass
class Options(TrainingOptions):
    """The options of train_unconditional.py."""


def train(options: Options) -> None:
    # Imported late, so that --help answers at once.
    from trainkit.data.cache import open_or_prepare
    from trainkit.diffusion.latents import encode_images
    from trainkit.diffusion.model import build_model
    from trainkit.diffusion.noise_schedule import add_noise, build_noise_scheduler
    from trainkit.diffusion.objective import denoising_errors
    from trainkit.diffusion.timesteps import draw_timesteps
    from trainkit.sampling.pipeline import unconditional_pipeline
    from trainkit.training.dry_run import only_measures
    from trainkit.training.outputs import Outputs
    from trainkit.training.start import check_options, prepare_process, resolve_options, start_accelerator, start_run
    from trainkit.training.validation import open_validation_images

    options = resolve_options(options)
    check_options(options)
    images = open_or_prepare(options)  # before the process group, which a long preparation would time out
    prepare_process(options)
    held_out = open_validation_images(options, images)
    images, held_out = encode_images(options, images, held_out)  # latents, with --vae_name_or_path
    accelerator = start_accelerator(options)
    noise_scheduler = build_noise_scheduler(options, clip_sample=not images.holds_latents)
    unet = build_model(options, images)
    run = start_run(options, accelerator, unet, images)

    def losses(model, batch, timesteps):  # one per image
        noisy_images = add_noise(noise_scheduler, batch.images, batch.noise, timesteps)  # float32
        prediction = model(noisy_images, timesteps, **batch.inputs).sample  # under autocast
        weighting = options.snr_gamma, options.loss_weighting
        return denoising_errors(noise_scheduler, prediction, batch.images, batch.noise, timesteps, *weighting)

    def loss_of(model, batch):
        timesteps = draw_timesteps(options, noise_scheduler, batch.uniforms, batch.images.device)
        return losses(model, batch, timesteps).mean()

    def pipeline_of(unet):
        return unconditional_pipeline(unet, noise_scheduler, **images.components)

    if only_measures(run, options, loss_of):  # --dry_run, --find_learning_rate
        return
    outputs = Outputs(run, losses, pipeline_of, held_out)

    for batch in run.batches():
        run.update(loss_of(run.model, batch))
        outputs.write_due()

    outputs.write_final()
    run.finish()


def main() -> None:
    train(parse_training_options(Options, __doc__))


if __name__ == "__main__":
    run_script(main)
