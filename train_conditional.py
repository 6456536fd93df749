"""Train a diffusion model conditioned on classes, vectors, captions or images, and save a pipeline that accepts them.

    accelerate launch train_conditional.py --condition class --train_data_dir photos --resolution 64 \\
        --output_dir classes-64 --mixed_precision bf16

    # vectors: NAME.npy next to each image, or a list of numbers in its metadata
    accelerate launch train_conditional.py --condition vector --train_data_dir photos --output_dir vectors-64

    # captions: NAME.txt next to each image, one caption per line, or a `text` column
    accelerate launch train_conditional.py --condition text --train_data_dir photos --output_dir captions-64 \\
        --text_encoder_name_or_path openai/clip-vit-large-patch14

    # another image, made from the image itself: super-resolution, inpainting (mask), colouring (grayscale), edges
    accelerate launch train_conditional.py --condition image --condition_from downscale:4 --train_data_dir photos \\
        --output_dir upsampler-64

    # another image that belongs to it: label maps with the names of the photos, to photos
    accelerate launch train_conditional.py --condition image --train_data_dir photos --conditioning_data_dir maps \\
        --conditioning_classes 20 --output_dir maps-to-photos-64

    # start from an unconditional pipeline, or from one with other classes
        --pretrained_model_name_or_path ddpm-photos-64

    # after a kill, a crash or Ctrl-C: add this to the same command
        --resume_from_checkpoint latest

All flags of train_unconditional.py work here with the same meaning. Steps are optimizer steps.
"""

from trainkit.errors import run_script
from trainkit.options.script import ConditionalTrainingOptions, parse_training_options


def train(options: ConditionalTrainingOptions) -> None:
    # Imported late, so that --help answers at once.
    from trainkit.data.cache import open_or_prepare
    from trainkit.data.loading.class_order import balanced_order
    from trainkit.diffusion.conditioning import check_condition, open_condition
    from trainkit.diffusion.latents import encode_images
    from trainkit.diffusion.model import build_model
    from trainkit.diffusion.noise_schedule import add_noise, build_noise_scheduler
    from trainkit.diffusion.objective import denoising_errors
    from trainkit.diffusion.timesteps import draw_timesteps
    from trainkit.sampling.pipeline import conditional_pipeline
    from trainkit.training.dry_run import only_measures
    from trainkit.training.outputs import Outputs
    from trainkit.training.start import check_options, prepare_process, resolve_options, start_accelerator, start_run
    from trainkit.training.validation import open_validation_images

    options = resolve_options(options)
    check_condition(options)
    check_options(options)
    images = open_or_prepare(options)  # before the process group, which a long preparation would time out
    prepare_process(options)
    condition = open_condition(options, images)  # encodes captions, once
    held_out = open_validation_images(options, images)
    held_out_condition = None if held_out is None else condition.for_images(held_out)
    order = balanced_order(images, options)
    images, held_out = encode_images(options, images, held_out)  # latents, with --vae_name_or_path
    accelerator = start_accelerator(options)
    noise_scheduler = build_noise_scheduler(options, clip_sample=not images.holds_latents)
    unet = build_model(options, images, condition)
    run = start_run(options, accelerator, unet, images, condition, order)

    def losses(model, batch, timesteps):  # one per image
        noisy_images = add_noise(noise_scheduler, batch.images, batch.noise, timesteps)  # float32
        prediction = model(batch.with_picture(noisy_images), timesteps, **batch.inputs).sample  # under autocast
        weighting = options.snr_gamma, options.loss_weighting
        return denoising_errors(noise_scheduler, prediction, batch.images, batch.noise, timesteps, *weighting)

    def loss_of(model, batch):
        timesteps = draw_timesteps(options, noise_scheduler, batch.uniforms, batch.images.device)
        return losses(model, batch, timesteps).mean()

    def pipeline_of(unet):
        return conditional_pipeline(unet, noise_scheduler, **condition.components, **images.components)

    if only_measures(run, options, loss_of):  # --dry_run, --find_learning_rate
        return
    outputs = Outputs(run, losses, pipeline_of, held_out, held_out_condition)

    for batch in run.batches():
        run.update(loss_of(run.model, batch))
        outputs.write_due()

    outputs.write_final()
    run.finish()


def main() -> None:
    train(parse_training_options(ConditionalTrainingOptions, __doc__))


if __name__ == "__main__":
    run_script(main)
