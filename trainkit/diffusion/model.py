"""The network to train: a UNet for the images and their condition, from random or pretrained weights."""

from diffusers import UNet2DConditionModel, UNet2DModel

from trainkit.data.loading.augment_draws import LABELS
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.statistics import vector_statistics
from trainkit.diffusion.augmentation_input import add_augmentation_input
from trainkit.diffusion.conditioning import ImageCondition, add_vector_embedding
from trainkit.diffusion.latents import LatentImages
from trainkit.diffusion.pretrained import load_pretrained
from trainkit.diffusion.unet import build_unet
from trainkit.options.script import TrainingOptions
from trainkit.terminal import say


def build_model(
    options: TrainingOptions, images: PreparedImages | LatentImages, condition: ImageCondition | None = None
) -> UNet2DModel | UNet2DConditionModel:
    """A UNet for `images` and their `condition`, on the CPU.

    Its weights are random, or those of `--pretrained_model_name_or_path` as far as they fit. What was loaded is
    printed once per machine. Raises `UserError` if the model does not fit the images.
    """
    config = {} if condition is None else condition.unet_config
    unet = build_unet(options, images.height, images.width, images.channels, **config)
    if config.get("class_embed_type") == "identity":
        add_vector_embedding(unet, *vector_statistics(images, options))
    if options.pretrained_model_name_or_path is not None:
        loaded = load_pretrained(unet, options.pretrained_model_name_or_path, getattr(condition, "names", None))
        say(loaded)
    if options.augmentation_conditioning:
        add_augmentation_input(unet, LABELS)
    return unet
