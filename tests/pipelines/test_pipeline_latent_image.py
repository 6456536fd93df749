"""Pipelines that see a second image and work on latents: sizes in pixels, known pixels, null conditions."""

import numpy as np
import pytest
import torch
from conditional_helpers import class_unet
from diffusers import DDIMScheduler, DDPMScheduler
from latent_helpers import LATENT_CHANNELS, make_vae
from PIL import Image

from pipelines.conditional import ConditionalPipeline
from pipelines.image_input import ImageInput
from trainkit.diffusion.latents import latent_grid
from trainkit.sampling.generate import generate
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline


def latent_pipeline(kind, scheduler=None, **settings):
    vae = make_vae()
    image_input = ImageInput(kind=kind, channels=3, **settings, **latent_grid(vae))
    channels = {"in_channels": LATENT_CHANNELS + image_input.num_channels, "out_channels": LATENT_CHANNELS}
    unet = class_unet(num_class_embeds=None, sample_size=8, **channels)
    pipeline = ConditionalPipeline(unet, scheduler or DDIMScheduler(), vae=vae, image_input=image_input)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(height=16, width=16, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


QUICK = {"num_inference_steps": 2, "output_type": "np"}


def test_known_pixels_come_out_as_they_went_in():
    """To the bit, though the decoder would change all of them."""
    pipeline, image = latent_pipeline("mask"), picture()
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[3:9, 5:12] = 255
    for made in (
        np.asarray(pipeline(image=image, mask_image=mask, num_inference_steps=2, guidance_scale=2.0).images[0]),
        next(generate(pipeline, [0], 2, 1, [{"image": np.asarray(image), "mask_image": mask}]))[0],
    ):
        assert (made[mask == 0] == np.asarray(image)[mask == 0]).all() and (made != np.asarray(image)).any()
    latents = pipeline(image=image, mask_image=mask, num_inference_steps=2, output_type="latent").images
    assert latents.shape == (1, LATENT_CHANNELS, 8, 8)


def test_sizes_are_those_of_pixels():
    enlarging, grey = latent_pipeline("downscale", factor=2, noise=0.2), latent_pipeline("grayscale")
    assert enlarging.image_size == (16, 16) and enlarging.size == (8, 8)
    assert enlarging(image=picture(8, 12), **QUICK).images.shape == (1, 16, 24, 3)
    assert enlarging(image=[None], **QUICK).images.shape == (1, 16, 16, 3)
    assert grey(image=picture(20, 16), **QUICK).images.shape == (1, 20, 16, 3)
    with pytest.raises(ValueError, match=r"image is 18x16 \(HxW\): the sides of the result must be multiples of 4"):
        grey(image=picture(18, 16), **QUICK)


def test_an_image_depends_on_its_seed_and_picture_alone():
    pipeline = latent_pipeline("downscale", DDPMScheduler(), factor=2, noise=0.2)
    pictures = [picture(8, 8, seed) for seed in range(2)]
    given = {"guidance_scale": 2.0, "image_noise": 0.1, **QUICK}
    together = pipeline(image=[*pictures, None], generator=generators(5, 6, 7), **given).images
    for number, one in enumerate([*pictures, None]):
        alone = pipeline(image=[one], generator=generators(5 + number), **given).images
        np.testing.assert_allclose(alone[0], together[number], atol=2 / 255)
    other = pipeline(image=[pictures[1]], generator=generators(5), **given).images
    assert not np.allclose(other[0], together[0], atol=2 / 255)


@pytest.mark.parametrize("kind", ["mask", "labels"])
def test_without_a_picture_all_channels_are_null(kind):
    pipeline = latent_pipeline(kind, **({"classes": 3} if kind == "labels" else {}))
    encoded, count, _ = pipeline.encode(image=[None, None])
    assert count == 2 and torch.equal(encoded[0]["image"], encoded[1]["image"])
    assert encoded[0]["image"].shape[-2:] == (8, 8) and not encoded[0]["image"][:, :-1].any()
    assert (encoded[0]["image"][:, -1] == (kind == "mask")).all()


def test_it_is_saved_and_loaded_with_its_grid(tmp_path):
    pipeline = latent_pipeline("downscale", factor=2, noise=0.2)
    parts = {"image_input": pipeline.image_input, "vae": pipeline.vae}
    save_pipeline(tmp_path, conditional_pipeline(pipeline.unet, DDPMScheduler(), **parts), "")
    again = ConditionalPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    again.scheduler = pipeline.scheduler
    again.set_progress_bar_config(disable=True)
    assert again.image_input.config.latent_factor == 2 and again.image_input.num_channels == LATENT_CHANNELS + 1
    made = [one(image=picture(8, 8), generator=generators(5), **QUICK).images for one in (pipeline, again)]
    np.testing.assert_allclose(*made, atol=1e-5)
