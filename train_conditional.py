"""Train a diffusion model on images with a class, a vector or captions each, and save a pipeline that takes these.

    accelerate launch train_conditional.py --condition class --train_data_dir photos --resolution 64 \\
        --output_dir classes-64 --mixed_precision bf16

    # vectors: NAME.npy beside each image, or a list of numbers in its metadata
    accelerate launch train_conditional.py --condition vector --train_data_dir photos --output_dir vectors-64

    # captions: NAME.txt beside each image, one a line, or a `text` column
    accelerate launch train_conditional.py --condition text --train_data_dir photos --output_dir captions-64 \\
        --text_encoder_name_or_path openai/clip-vit-large-patch14

    # from an unconditional pipeline, or one of other classes
        --pretrained_model_name_or_path ddpm-photos-64

    # after a kill, a crash or Ctrl-C: the same command and
        --resume_from_checkpoint latest

All flags of train_unconditional.py work here with the same meaning; steps are optimizer steps.
"""

from dataclasses import dataclass

from trainkit.config import option
from trainkit.errors import run_script
from trainkit.options.model import LatentOptions, TextOptions
from trainkit.training.start import TrainingOptions, parse_training_options


@dataclass
class ConditioningOptions:
    """conditioning: what the model is told of each image"""

    condition: str = option(
        "class", "class: the class of an image; vector: the numbers stored with it; text: its captions",
        choices=("class", "vector", "text"),
    )  # fmt: skip
    conditioning_dropout: float = option(
        0.1, "chance that an image is trained without its condition, which guidance needs (Ho & Salimans 2022)"
    )
    class_balance: str = option(
        "none", "how often images of a class come: as many as there are, by the root of that, or all classes alike",
        choices=("none", "sqrt", "inverse"),
    )  # fmt: skip
    preview_guidance_scale: float = option(2.0, "guidance of the sample grids while training; 1: none")


@dataclass
class Options(ConditioningOptions, TextOptions, LatentOptions, TrainingOptions):
    """Everything train_conditional.py can be told."""


def train(options: Options) -> None:
    # Imported late, so that --help answers at once.
    from trainkit.data.cache import cache_root, open_or_prepare
    from trainkit.data.loading.augment_draws import LABELS
    from trainkit.data.loading.class_order import balanced_order
    from trainkit.data.loading.statistics import vector_statistics
    from trainkit.diffusion.augmentation_input import add_augmentation_input
    from trainkit.diffusion.conditioning import add_vector_embedding, check_condition, open_condition
    from trainkit.diffusion.latents import check_latent_options, open_latents, without_clipping
    from trainkit.diffusion.noise_schedule import add_noise, build_noise_scheduler
    from trainkit.diffusion.objective import denoising_errors
    from trainkit.diffusion.pretrained import load_pretrained
    from trainkit.diffusion.timesteps import draw_timesteps
    from trainkit.diffusion.unet import build_unet
    from trainkit.hub import create_repository
    from trainkit.training.launch import make_deterministic, set_cpu_threads
    from trainkit.training.learning_rate import find_learning_rate
    from trainkit.training.run import Run
    from trainkit.training.score import SampleScore
    from trainkit.training.start import check_before_preparation, start_accelerator
    from trainkit.training.validation import HeldOutLoss, open_validation_images

    check_condition(options)
    check_before_preparation(options)
    check_latent_options(options)
    images = open_or_prepare(options)  # before any process group exists: a long preparation must not time it out
    set_cpu_threads(options.cpu_threads)
    if options.deterministic:
        make_deterministic()
    condition = open_condition(options, images)  # encodes captions, once
    held_out = open_validation_images(options, images)
    held_out_condition = None if held_out is None else condition.of(held_out)
    order = balanced_order(images, options)
    if options.vae_name_or_path is not None:
        images = open_latents(options, images, cache_root(options), options.random_flip)
        held_out = None if held_out is None else open_latents(options, held_out, cache_root(options), False)
    accelerator = start_accelerator(options)
    unet = build_unet(options, images.height, images.width, images.channels, **condition.unet_config)
    if options.condition == "vector":
        add_vector_embedding(unet, *vector_statistics(images, options))
    if options.pretrained_model_name_or_path is not None:
        accelerator.print(load_pretrained(unet, options.pretrained_model_name_or_path, condition.names))
    if options.augmentation_conditioning:
        add_augmentation_input(unet, LABELS)
    noise_scheduler = build_noise_scheduler(options)
    if options.vae_name_or_path is not None:
        without_clipping(noise_scheduler)
    run = Run(options, accelerator, unet, images, condition, order)
    repo_id = create_repository(options) if options.push_to_hub and accelerator.is_main_process else None

    def losses(model, batch, timesteps):  # one an image, of training and of validation alike
        noisy_images = add_noise(noise_scheduler, batch.images, batch.noise, timesteps)  # float32
        told = {} if batch.augmentation is None else {"augmentation": batch.augmentation}
        prediction = model(noisy_images, timesteps, **batch.condition, **told).sample  # under autocast
        weighting = options.snr_gamma, options.loss_weighting
        return denoising_errors(noise_scheduler, prediction, batch.images, batch.noise, timesteps, *weighting)

    def unguided_samples(unet, indices):  # guidance would trade the variety that the score looks for
        return samples(run, unet, noise_scheduler, condition.of_images(indices), guidance_scale=1.0)

    def loss_of(model, batch):
        return losses(model, batch, draw_timesteps(options, noise_scheduler, batch.uniforms)).mean()

    if options.find_learning_rate:
        find_learning_rate(run, loss_of)
        return
    validation = None
    if held_out is not None:
        validation = HeldOutLoss(run, held_out, losses, options.ddpm_num_steps, held_out_condition)
    score = None
    if options.score_steps is not None:
        score = SampleScore(run, held_out, noise_scheduler, unguided_samples)

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


def samples(run, unet, noise_scheduler, conditions, guidance_scale: float):
    """Images (N, H, W, C) uint8, one for each of `conditions`, made by all processes from --seed, --seed + 1, ..."""
    from trainkit.sampling.guided import samples_of_conditions

    options = run.options
    return samples_of_conditions(
        run.accelerator,
        unet,
        noise_scheduler,
        conditions,
        seed=options.seed,
        num_inference_steps=options.ddpm_num_inference_steps,
        batch_size=options.eval_batch_size,
        guidance_scale=guidance_scale,
        components=components(run),
    )


def components(run) -> dict:
    """What the pipeline has beside UNet and scheduler: what its condition needs, and what decodes latents."""
    return run.condition.components | getattr(run.images, "components", {})


def preview(run, noise_scheduler) -> None:
    """Write a grid of samples from the averaged weights: samples/<step>.png and samples.png."""
    from trainkit.training.outputs import write_preview

    options = run.options
    conditions, columns = run.condition.to_preview(options.eval_batch_size, options.seed)
    with run.averaged_weights() as unet:
        images = samples(run, unet, noise_scheduler, conditions, options.preview_guidance_scale)
    write_preview(run, images, columns)


def save(run, noise_scheduler, repo_id: str | None) -> None:
    """Save the pipeline with the averaged weights into --output_dir, and push it where asked."""
    from trainkit.hub import conditional_model_card, push_pipeline
    from trainkit.sampling.conditional import CONDITIONAL_PIPELINE_FILES, save_conditional_pipeline

    options, condition = run.options, run.condition
    images = getattr(run.images, "images", run.images)  # of pixels, also where it trains on latents
    with run.averaged_weights() as unet:
        if run.accelerator.is_main_process:
            card = conditional_model_card(
                options, condition, images.height, images.width, run.step, run.shape.global_size
            )
            id2label = None if condition.names is None else dict(enumerate(condition.names))
            with run.writing("the pipeline"):
                save_conditional_pipeline(
                    run.output_dir, unet, noise_scheduler, card, id2label=id2label, **components(run)
                )
                if repo_id is not None:
                    push_pipeline(run.output_dir, repo_id, options.hub_token, CONDITIONAL_PIPELINE_FILES, run.step)
    run.accelerator.wait_for_everyone()


def main() -> None:
    train(parse_training_options(Options, __doc__))


if __name__ == "__main__":
    run_script(main)
