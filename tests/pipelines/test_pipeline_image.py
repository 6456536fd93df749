"""Pipelines that take another image: what they accept, what they keep, and what they refuse."""

import numpy as np
import pytest
import torch
from conditional_helpers import class_unet, image_pipeline, text_parts
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image

from pipelines.conditional import ConditionalPipeline
from pipelines.image_input import ImageInput, edges

QUICK = {"num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def enlarging():
    return image_pipeline("downscale", factor=4, noise=0.2)


@pytest.fixture(scope="module")
def filling():
    return image_pipeline("mask")


def picture(side=4, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def mask(side=16):
    """White is the right half."""
    pixels = np.zeros((side, side), dtype=np.uint8)
    pixels[:, side // 2 :] = 255
    return pixels


def test_a_picture_may_be_an_image_an_array_or_a_tensor(enlarging):
    image = picture()
    pixels = np.asarray(image)
    given = [
        image, pixels, pixels[None], pixels / 255, torch.from_numpy(pixels / 255).permute(2, 0, 1), [image],
        torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None],
    ]  # fmt: skip
    made = [enlarging(image=one, generator=generators(5), **QUICK).images for one in given]
    assert made[0].shape == (1, 16, 16, 3)
    for other in made[1:]:
        np.testing.assert_allclose(other, made[0], atol=1e-5)
    other = enlarging(image=picture(seed=1), generator=generators(5), **QUICK).images
    assert not np.allclose(other, made[0], atol=1e-2)


def test_the_size_follows_the_picture(enlarging, filling):
    assert enlarging(image=picture(6), **QUICK).images.shape == (1, 24, 24, 3)
    wide = Image.new("RGB", (8, 2))
    assert enlarging(image=[wide, None], num_images_per_prompt=2, **QUICK).images.shape == (4, 8, 32, 3)
    assert filling(image=picture(20), mask_image=mask(20), **QUICK).images.shape == (1, 20, 20, 3)
    assert filling(image=[None], **QUICK).images.shape == (1, 16, 16, 3)


def test_each_image_is_the_same_in_any_batch(enlarging):
    """Its noise too, which is drawn apart from that of the chain."""
    pictures = [picture(seed=seed) for seed in range(3)]
    given = {"guidance_scale": 2.0, "image_noise": 0.1, **QUICK}
    together = enlarging(image=[*pictures, None], generator=generators(5, 6, 7, 8), **given).images
    for number, one in enumerate([*pictures, None]):
        alone = enlarging(image=[one], generator=generators(5 + number), **given).images
        np.testing.assert_allclose(alone[0], together[number], atol=1e-4)
    clean = enlarging(image=pictures[0], generator=generators(5), guidance_scale=2.0, **QUICK).images
    assert not np.allclose(clean[0], together[0], atol=1e-3)


def test_known_pixels_come_out_as_they_went_in(filling):
    """To the bit, in 8 bits per channel, also with guidance and for several masks."""
    image, other = picture(16), mask().T
    given = {"image": [image, image], "mask_image": [mask(), other], "guidance_scale": 3.0, "num_inference_steps": 2}
    made = [np.asarray(one) for one in filling(**given).images]
    for result, hidden in zip(made, (mask(), other), strict=True):
        assert np.array_equal(result[hidden == 0], np.asarray(image)[hidden == 0])
        assert not np.array_equal(result[hidden > 0], np.asarray(image)[hidden > 0])


def test_nothing_is_known_of_hidden_pixels(filling):
    pixels = np.asarray(picture(16)).copy()
    one = filling(image=pixels, mask_image=mask(), generator=generators(3), **QUICK).images
    pixels[:, 8:] = 0
    assert np.array_equal(filling(image=pixels, mask_image=mask(), generator=generators(3), **QUICK).images, one)


def test_guidance_leads_away_from_the_null_condition(filling):
    """Without a condition the input is the mask of an image of which nothing is known."""
    seen = []
    forward = filling.unet.forward

    def record(sample, *rest, **named):
        seen.append(sample)
        return forward(sample, *rest, **named)

    filling.unet.forward = record
    try:
        filling(image=picture(16), mask_image=mask(), guidance_scale=2.0, **QUICK)
    finally:
        filling.unet.forward = forward
    null, given = seen[0].chunk(2)
    assert torch.equal(null[:, :3], given[:, :3]) and not null[:, 3:6].any() and (null[:, 6] == 1).all()
    assert torch.equal(given[0, 6], torch.from_numpy(mask() / 255).float()) and not given[0, 3:6, :, 8:].any()


def test_an_unconditional_guide_needs_no_picture(enlarging):
    weak = class_unet(1, num_class_embeds=None)
    parts = {"image_input": enlarging.image_input, "guidance_unet": weak}
    pipeline = ConditionalPipeline(enlarging.unet, DDIMScheduler(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(image=picture(), guidance_scale=2.0, **QUICK).images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("kind", ["downscale", "grayscale", "edges"])
def test_a_mirrored_image_has_a_mirrored_picture(kind):
    image_input = ImageInput(kind=kind, channels=3, factor=2 if kind == "downscale" else 1)
    images = torch.rand(2, 3, 16, 12) * 2 - 1
    pictures = image_input.pictures(images)
    assert pictures.shape == (2, image_input.picture_channels, *((8, 6) if kind == "downscale" else (16, 12)))
    torch.testing.assert_close(image_input.pictures(images.flip(-1)), pictures.flip(-1))
    assert image_input(pictures).shape == (2, image_input.num_channels, 16, 12)


def test_a_prompt_and_an_image_together(tmp_path):
    """Any may be null, and one prompt is for all images."""
    unet, parts = text_parts(tmp_path)
    image_input = ImageInput(kind="grayscale", channels=3)
    wider = UNet2DConditionModel.from_config(unet.config, in_channels=4).eval()
    pipeline = ConditionalPipeline(wider, DDIMScheduler(), image_input=image_input, prompt_length=8, **parts)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.conditions == ("prompt", "image")
    grey = [picture(16, "L", seed) for seed in range(2)]

    def made(seeds, **given):
        return pipeline(**given, guidance_scale=2.0, generator=generators(*seeds), **QUICK).images

    both = made((5, 6), prompt="a red square", image=grey)
    np.testing.assert_allclose(made((6,), prompt=["a red square"], image=grey[1])[0], both[1], atol=1e-4)
    assert not np.allclose(made((6,), prompt="blue", image=grey[1])[0], both[1], atol=1e-4)
    np.testing.assert_allclose(made((5,), image=grey[0]), made((5,), prompt=[None], image=grey[0]), atol=1e-5)
    np.testing.assert_allclose(made((5,), prompt="blue"), made((5,), prompt="blue", image=[None]), atol=1e-5)
    with pytest.raises(ValueError, match="conditions: 3, 2 rows were given: give one of each, or as many"):
        made((5, 6), prompt=["a", "red", "blue"], image=grey)


def test_edges_are_where_the_image_changes():
    images = torch.full((1, 3, 8, 8), -1.0)
    images[..., 4:] = 1
    found = edges(images)
    assert (found[..., 3:5] == 1).all() and (found[..., :3] == -1).all() and (found[..., 5:] == -1).all()


def test_the_noise_of_a_small_image_is_told_to_the_network(enlarging):
    clean, noisy = (
        enlarging.image_input.encode([picture()], level=level, generator=generators(0))[0] for level in (0.0, 0.2)
    )
    assert (clean[:, 3] == 0).all() and (noisy[:, 3] == 0.2).all()
    assert 0.05 < (noisy - clean)[:, :3].std() < 0.3


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("mask", {"image": picture(16)}, "mask_image is missing"),
        ("mask", {"image": picture(16), "mask_image": mask(8)}, "mask_image is 8x8 .*its image 16x16"),
        ("mask", {"image": picture(16), "mask_image": 0 * mask()}, "black everywhere"),
        ("mask", {"image": picture(16), "mask_image": 0 * mask() + 255}, "white everywhere"),
        ("mask", {"image": [picture(16)] * 3, "mask_image": [mask()] * 2}, "2 masks for 3 images"),
        ("mask", {"image": picture(15), "mask_image": mask(15)}, "15x15 .*multiples of 2"),
        ("mask", {"image": np.zeros((16, 16, 4), np.uint8), "mask_image": mask()}, "the model accepts 3 channels"),
        ("mask", {"image": torch.full((3, 16, 16), 7.0), "mask_image": mask()}, r"numbers from 7 to 7; .*in \[0, 1\]"),
        ("mask", {"image": "cat.png", "mask_image": mask()}, "a str is no PIL image"),
        ("mask", {"image": [picture(16), picture(18)], "mask_image": mask()}, "mask_image is 16x16"),
        ("mask", {"image": []}, "image: the list is empty"),
        ("mask", {"class_labels": [0]}, "class_labels: this model accepts image and mask_image"),
        ("mask", {}, "image and mask_image is missing"),
        ("downscale", {"image": [picture(4), picture(8)]}, "pictures of 4x4 and of 8x8 .* in one call"),
        ("downscale", {"image": picture(), "mask_image": mask()}, "mask_image: this model accepts image"),
        ("downscale", {"image": picture(), "image_noise": 0.5}, "image_noise 0.5: .* noise of 0 to 0.2"),
    ],
)
def test_one_line_error(enlarging, filling, kind, given, message):
    pipeline = {"mask": filling, "downscale": enlarging}[kind]
    with pytest.raises(ValueError, match=message) as error:
        pipeline(**given, **QUICK)
    assert "\n" not in str(error.value)
